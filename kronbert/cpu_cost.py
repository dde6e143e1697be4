"""What a Kronecker product costs on a CPU, predicted from a table of measured primitives.

A form (`kronbert.forms`) is a handful of primitives: plain products, batched products of a
small matrix, transposing copies, additions. Their times were measured on a grid of sizes, once per
machine (`kronbert.cpu_calibrate`); between grid points the logarithm of the time is interpolated
in the logarithms of the sizes, beyond them time grows with the work. No tensor is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from . import native
from .errors import ReportError
from .forms import DENSE, LOW_RANK, Form, chunk_rows, forms_of
from .shapes import Groups, KroneckerShape

MARGIN = 1.2
"""A factored form must be predicted this much faster than the dense one: most predictions lay
within a fifth of what was measured after."""

COLD_US_PER_BYTE, COLD_ROWS = 3e-5, 16
"""What reading a form's matrices costs beside its primitives, which were timed with theirs in
cache: in a model of many layers none lies there when its turn comes (768x768 in bfloat16 on 128
rows: 92 us alone, 136 in an encoder). From so many rows on; below, a table of one layer alone is
what `nn.Linear` is compared with."""

STAGE_US = 4.0
"""Views and calls around a stage, beside its primitives: what decides at one row."""

GROWTH = 1.0
"""A form may keep matrices of at most this many times the dense weight's numbers."""

PRIMITIVES, AXES = ("gemm", "mix", "turn", "add"), (3, 4, 3, 1)
DTYPES = ("float32", "bfloat16")

Grid = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Primitive:
    """Times (us) of one operation on the grid of its sizes, in the order of `itertools.product`."""

    axes: Grid
    times_us: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(list(axis) == sorted({*axis}) for axis in self.axes)
        if not rising or not all(type(x) is int and x > 0 for axis in self.axes for x in axis):
            raise ReportError(
                f"Primitive: axes {self.axes}: expected rising whole numbers > 0. Run `kronbert "
                "calibrate` to measure them."
            )
        points = math.prod(len(axis) for axis in self.axes)
        if len(self.times_us) != points or not all(0 < us < math.inf for us in self.times_us):
            raise ReportError(
                f"Primitive: {len(self.times_us)} times on a grid of {points} points: expected one "
                "for each, in us, > 0. Run `kronbert calibrate` to measure them."
            )

    def us(self, *sizes: int) -> float:
        """The predicted time at ``sizes``, one per axis."""
        beyond, corners = 1.0, []
        for size, axis in zip(sizes, self.axes, strict=True):
            inside = min(max(size, axis[0]), axis[-1])
            beyond *= max(size / inside, 1.0)
            corners.append(_bracket(inside, axis))
        total = 0.0
        for picks in product((0, 1), repeat=len(corners)):
            share, index = 1.0, 0
            for pick, (low, high, weight), axis in zip(picks, corners, self.axes, strict=True):
                share *= weight if pick else 1.0 - weight
                index = index * len(axis) + (high if pick else low)
            if share:
                total += share * math.log(self.times_us[index])
        return math.exp(total) * beyond

    def to_json(self) -> dict[str, Any]:
        return {"axes": self.axes, "times_us": [float(f"{us:.4g}") for us in self.times_us]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Primitive:
        return cls(tuple(tuple(axis) for axis in found["axes"]), tuple(found["times_us"]))


@dataclass(frozen=True)
class CostTable:
    """The primitives of one dtype on one machine.

    gemm (m, n, k): x (m, k) · w (n, k)ᵀ. mix (batch, p, q, width): a small (p, q) matrix on
    batches of (q, width). turn (elements, p, q): (..., p, q) copied as (..., q, p). add (elements):
    a bias in place."""

    itemsize: int
    gemm: Primitive
    mix: Primitive
    turn: Primitive
    add: Primitive

    def form_us(self, form: Form, shape: KroneckerShape, n: int) -> float:
        """Time of one group's product on n rows, in chunks, bias included."""
        step = chunk_rows(form, shape, self.itemsize)
        if n <= step:
            return self._chunk_us(form, shape, n)
        whole = (n // step) * self._chunk_us(form, shape, step)
        return whole + (self._chunk_us(form, shape, n % step) if n % step else 0.0)

    # A gather or spread costs what a turn of as many numbers does: 0.9 to 1.4 times, 16 to 4,096
    # rows of 768 in slices of 2 and 16.
    def _chunk_us(self, form: Form, shape: KroneckerShape, n: int) -> float:
        s, gemm = shape, self.gemm.us
        out, inner, add = s.out_features, s.in_features, self.add.us(n * s.out_features)
        if form == DENSE:
            return gemm(n, out, inner)
        if form == LOW_RANK:
            return gemm(n, s.rank, inner) + gemm(n, out, s.rank)
        if form.order == "b":
            middle = s.a_in * s.rank  # per output of b
            width = middle * s.b_out
            if form.first == "gather":
                first = self.turn.us(n * max(inner, width), s.a_in, s.b_in)
            elif form.first == "fold":
                first = gemm(n, width, inner)
            else:
                first = gemm(n * s.a_in, s.rank * s.b_out, s.b_in)
            if form.second == "spread":
                spread = self.turn.us(n * out, s.b_out, s.a_out)
                return first + gemm(n * s.b_out, s.a_out, middle) + spread
            if form.second == "mix":
                return first + self.mix.us(n, s.a_out, middle, s.b_out) + add
            if form.second == "fold":
                return first + gemm(n, out, width)
            if form.first == "rows":
                first += self.turn.us(n * width, middle, s.b_out)
            last = self.turn.us(n * out, s.b_out, s.a_out) + add
            return first + gemm(n * s.b_out, s.a_out, middle) + last
        width = s.a_out * s.rank * s.b_in
        last = gemm(n * s.a_out, s.b_out, s.rank * s.b_in) + add
        if form.first == "mix":
            return self.mix.us(n, s.a_out * s.rank, s.a_in, s.b_in) + last
        if form.first == "fold":
            return gemm(n, width, inner) + last
        first = self.turn.us(n * inner, s.a_in, s.b_in)
        first += gemm(n * s.b_in, s.a_out * s.rank, s.a_in)
        if form.second == "fold":
            return first + gemm(n, out, width)
        return first + self.turn.us(n * width, s.b_in, s.a_out * s.rank) + last

    def choose(self, groups: Groups, n: int, *, fresh: bool = False) -> tuple[Form, ...]:
        """The fastest form of every group on n rows; one `DENSE` for the sum of them all.

        fresh: the matrices are made anew for this product, as in training; none is folded then,
        as its gradient would be made dense first."""
        first = groups[0]
        dense_numbers = first.out_features * first.in_features
        passes = 3 if fresh else 1  # backward costs two forwards
        cold = COLD_US_PER_BYTE * self.itemsize if n >= COLD_ROWS else 0.0
        dense = passes * self.form_us(DENSE, first, n) + cold * dense_numbers
        if fresh:
            dense += sum(_rebuilt_us(shape) for shape in groups)
        kernels = not fresh and native.library() is not None
        picks, total = [], 0.0
        for shape in groups:
            costs = {
                form: 2 * STAGE_US
                + passes * self.form_us(form, shape, n)
                + cold * prepared_numbers(form, shape)
                for form in forms_of(shape, kernels=kernels)
                if form != DENSE
                and not (fresh and "fold" in form)
                and prepared_numbers(form, shape) <= GROWTH * dense_numbers
            }
            if not costs:
                return (DENSE,)
            pick = min(costs, key=costs.__getitem__)
            picks.append(pick)
            total += costs[pick]
        total += (len(groups) - 1) * passes * self.add.us(n * first.out_features)
        return tuple(picks) if total * MARGIN < dense else (DENSE,)

    def to_json(self) -> dict[str, Any]:
        return {"itemsize": self.itemsize} | {
            name: getattr(self, name).to_json() for name in PRIMITIVES
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CostTable:
        primitives = [Primitive.from_json(found[name]) for name in PRIMITIVES]
        axes = [len(one.axes) for one in primitives]
        if found["itemsize"] not in (2, 4) or axes != [*AXES]:
            raise ReportError(
                f"CostTable: numbers of {found['itemsize']!r} bytes and primitives of {axes} axes: "
                f"expected 2 or 4 and {[*AXES]}. Run `kronbert calibrate`."
            )
        return cls(found["itemsize"], *primitives)


def _rebuilt_us(shape: KroneckerShape) -> float:
    """Multiplying a weight out and taking its gradient apart: 0.8 to 1.2 ns a number, and 5 where
    runs of two are moved (768 to 3,072 wide, both dtypes, 2-core Xeon, torch 2.13)."""
    return 1e-3 * shape.out_features * shape.in_features * (1 + 8 / shape.b_in)


def prepared_numbers(form: Form, shape: KroneckerShape) -> int:
    """Numbers in the matrices that a form multiplies with."""
    s = shape
    if form == DENSE:
        return s.out_features * s.in_features
    b_first, a_first = s.a_in * s.rank * s.b_out, s.a_out * s.rank * s.b_in
    numbers = 0
    for stage, place in (
        (form.first, form.order),
        (form.second, "b" if form.order == "a" else "a"),
    ):
        middle = b_first if form.order == "b" else a_first
        side = s.in_features if stage is form.first and place == form.order else s.out_features
        if stage == "fold":
            numbers += middle * side
        else:
            numbers += s.rank * (s.a_out * s.a_in if place == "a" else s.b_out * s.b_in)
    return numbers


def load_tables(path: Path) -> dict[str, CostTable]:
    """dtype name -> table, from a file that `kronbert.cpu_calibrate` wrote; `ReportError` if it
    cannot be read or is not whole."""
    try:
        found = json.loads(path.read_text())["tables"]
        return {dtype: CostTable.from_json(found[dtype]) for dtype in DTYPES}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ReportError(
            f"{path}: holds no measured times that can be read ({error!r}). Run `kronbert "
            "calibrate` to write it anew."
        ) from error


@cache
def shipped_tables() -> dict[str, CostTable]:
    """The tables measured on the machine named in the file, used where none was calibrated."""
    return load_tables(Path(__file__).with_name("cpu_costs.json"))


def _bracket(size: int, axis: Sequence[int]) -> tuple[int, int, float]:
    """Neighbours of ``size`` on the axis and how far it lies from the lower to the upper one."""
    for high, value in enumerate(axis):
        if size <= value:
            low = max(high - 1, 0)
            if low == high or size == value:
                return high, high, 0.0
            return low, high, math.log(size / axis[low]) / math.log(value / axis[low])
    last = len(axis) - 1
    return last, last, 0.0
