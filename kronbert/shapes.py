"""`KroneckerShape`: the sizes of a sum of Kronecker products, its parameters and its FLOPs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import ShapeError

Order = Literal["a", "b"]
"""Which matrix meets the input first."""


@dataclass(frozen=True, order=True)
class KroneckerShape:
    """The sizes of ``sum_r a[r] ⊗ b[r]``: a (rank, a_out, a_in), b (rank, b_out, b_in).

    The weight it stands for is (a_out * b_out, a_in * b_in), as `nn.Linear` stores it. A truncated
    SVD of rank r is the member (out x 1) ⊗ (1 x in). start: in a table whose groups do not all
    cover every row, the row on which this group's first is added (`check_groups`). Raises
    `ShapeError` for a size that is no whole number >= 1.
    """

    a_out: int
    a_in: int
    b_out: int
    b_in: int
    rank: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("a_out", "a_in", "b_out", "b_in", "rank"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ShapeError(
                    f"KroneckerShape({name}={size!r}): expected a whole number >= 1. For a layer "
                    "that stays dense use the rule 'dense'."
                )
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise ShapeError(f"KroneckerShape(start={self.start!r}): expected a row, 0 or more.")

    @property
    def out_features(self) -> int:
        return self.a_out * self.b_out

    @property
    def in_features(self) -> int:
        return self.a_in * self.b_in

    @property
    def parameters(self) -> int:
        """Numbers in a and b."""
        return self.rank * (self.a_out * self.a_in + self.b_out * self.b_in)

    @property
    def full_rank(self) -> int:
        """The rank at which any weight of this size is met exactly (Tahaei et al. 2022, 3.1)."""
        return min(self.a_out * self.a_in, self.b_out * self.b_in)

    def flops(self, order: Order | None = None) -> int:
        """Additions and multiplications per input row; ``order`` None: the cheaper one.

        Tahaei et al. 2022, section 3.2: b first costs (2 b_in - 1) b_out a_in for x · bᵀ and
        (2 a_in - 1) b_out a_out for a · z. Adding the terms up comes on top, (rank - 1) out.
        """
        if order is None:
            order = self.order
        if order == "b":
            term = (2 * self.b_in - 1) * self.b_out * self.a_in
            term += (2 * self.a_in - 1) * self.b_out * self.a_out
        else:
            term = (2 * self.a_in - 1) * self.a_out * self.b_in
            term += (2 * self.b_in - 1) * self.b_out * self.a_out
        return self.rank * term + (self.rank - 1) * self.out_features

    @property
    def order(self) -> Order:
        """The order with fewer FLOPs; b first on a tie."""
        return "b" if self.flops("b") <= self.flops("a") else "a"

    @property
    def low_rank(self) -> bool:
        """True for the truncated-SVD member (out x 1) ⊗ (1 x in)."""
        return self.a_in == 1 and self.b_out == 1

    def __str__(self) -> str:
        if self.low_rank and self.out_features > 1 and self.in_features > 1:
            return f"svd({self.rank}) {self.out_features}x{self.in_features}{self._place}"
        terms = f"{self.rank}·" if self.rank > 1 else ""
        return f"{terms}{self.a_out}x{self.a_in}⊗{self.b_out}x{self.b_in}{self._place}"

    @property
    def spec(self) -> str:
        """The ASCII form that files hold and `parse` reads: ``4:384x48*2x16``, with the first row
        behind it where that is not 0: ``64:2000x1*1x384@999``."""
        terms = f"{self.rank}:" if self.rank > 1 else ""
        return f"{terms}{self.a_out}x{self.a_in}*{self.b_out}x{self.b_in}{self._place}"

    @property
    def _place(self) -> str:
        return f"@{self.start}" if self.start else ""

    @classmethod
    def parse(cls, text: str) -> KroneckerShape:
        """``"384x48*2x16"``, ``"4·384x48⊗2x16"`` or ``"64:2000x1*1x384@999"``: a, b, in front the
        rank, behind them the first row.

        Raises `ShapeError` for any other text."""
        sizes_of = r"(\d+)x(\d+)\s*[*⊗]\s*(\d+)x(\d+)"
        match = re.fullmatch(rf"(?:(\d+)\s*[·:]\s*)?{sizes_of}(?:\s*@\s*(\d+))?", text.strip())
        if match is None:
            raise ShapeError(
                f"{text!r} is no Kronecker shape: expected 'a_out x a_in ⊗ b_out x b_in', for "
                "example '384x48⊗2x16', or '4·384x48⊗2x16' for a sum of 4."
            )
        rank, *sizes, start = match.groups()
        a_out, a_in, b_out, b_in = (int(size) for size in sizes)
        return cls(a_out, a_in, b_out, b_in, int(rank or 1), int(start or 0))


Groups = tuple[KroneckerShape, ...]
"""The summed groups of one layer; nearly always one."""


def parse_groups(text: str) -> Groups:
    """Groups written as ``spec`` joined by " + "; `ShapeError` for any other text."""
    return tuple(KroneckerShape.parse(part) for part in text.split("+"))


def check_groups(
    groups: Sequence[KroneckerShape], out: int, inner: int, where: str, *, table: bool = False
) -> None:
    """Raise `ShapeError` naming ``where`` unless every group makes an (out, inner) weight.

    table: an embedding's: its first group makes all of it, every other all or a block of rows."""
    if not groups:
        raise ShapeError(f"{where}: expected at least one Kronecker shape, got none.")
    for shape in groups:
        if not isinstance(shape, KroneckerShape):
            raise ShapeError(
                f"{where}: {shape!r} is a {type(shape).__name__}, expected a KroneckerShape. For "
                "text: KroneckerShape.parse('384x48*2x16')."
            )
        if table and shape is not groups[0] and partial(shape, out):
            last = shape.start + shape.out_features - 1
            if last >= out or shape.in_features != inner:
                raise ShapeError(
                    f"{where}: {shape} makes rows {shape.start} to {last} of {shape.in_features} "
                    f"numbers, expected rows up to {out - 1} of {inner}. Change its start or its "
                    "sizes."
                )
            continue
        if shape.start:
            raise ShapeError(
                f"{where}: {shape} starts at row {shape.start}: expected 0. Only the second and "
                "later groups of an embedding may cover a block of rows."
            )
        for label, part, whole in (
            ("a_out", shape.a_out, out),
            ("b_out", shape.b_out, out),
            ("a_in", shape.a_in, inner),
            ("b_in", shape.b_in, inner),
        ):
            if whole % part:
                side = "out_features" if label.endswith("out") else "in_features"
                low, high = near_divisors(part, whole)
                nearest = (
                    f"The nearest divisor is {low}: use it"
                    if low == high
                    else f"The nearest divisors are {low} and {high}: use one of them"
                )
                raise ShapeError(
                    f"{where}: {label}={part} does not divide {side}={whole}. {nearest}, or leave "
                    "the layer dense (keep=[its name])."
                )
        if (shape.out_features, shape.in_features) != (out, inner):
            raise ShapeError(
                f"{where}: {shape} makes a {shape.out_features}x{shape.in_features} weight, "
                f"expected {out}x{inner}. Change a or b so that a_out*b_out = {out} and "
                f"a_in*b_in = {inner}."
            )


def partial(shape: KroneckerShape, rows: int) -> bool:
    """Whether the group makes a block of a table's rows only."""
    return shape.start > 0 or shape.out_features < rows


def table_starts(groups: Groups, rows: int) -> tuple[int, ...] | None:
    """The first row of every group of a table; None where each makes the whole table."""
    if not any(partial(shape, rows) for shape in groups):
        return None
    return tuple(shape.start for shape in groups)


def divisors(n: int) -> Iterator[int]:
    """The divisors of n >= 1, ascending."""
    low = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    yield from low
    yield from (n // d for d in reversed(low) if d * d != n)


def near_divisors(part: int, whole: int) -> tuple[int, int]:
    """The largest divisor of whole up to part and the smallest from it on; twice whole when part is
    larger."""
    below = [d for d in divisors(whole) if d <= part] or [1]
    above = [d for d in divisors(whole) if d >= part] or [whole]
    return below[-1], above[0]


def low_rank(out: int, inner: int, rank: int) -> KroneckerShape:
    """A truncated SVD of an (out, inner) weight as a Kronecker shape."""
    return KroneckerShape(out, 1, 1, inner, rank)


def dense_flops(out: int, inner: int) -> int:
    """FLOPs per row of a dense product, counted as the paper does: (2 in - 1) out."""
    return (2 * inner - 1) * out
