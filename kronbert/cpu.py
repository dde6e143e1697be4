"""The CPU engine: picks a form for every product and keeps its matrices while nothing changes.

Which form runs is predicted from tables (`kronbert.cpu_cost`): calibrated on this machine, or
shipped. Without gradients, in eager mode, the matrices that a form multiplies with (folded,
transposed or dense) are kept until the layer's parameters change; with gradients they are made
anew. Parameters that change behind torch's back, through ``param.data``, are not seen: call
`forget`, or ``module.train()`` or ``module.eval()``, which do so for a module's parameters.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from . import cpu_calibrate
from .cpu_cost import CostTable
from .forms import DENSE, Form, prepare, run, run_in_chunks, weight
from .shapes import Groups, KroneckerShape

Pairs = Sequence[tuple[Tensor, Tensor]]
Run = Callable[[Tensor, Tensor | None], Tensor]

PLAIN = (Tensor, nn.Parameter)
"""Tensors whose numbers can be read: no fake, batched or otherwise wrapped ones."""

_linear = torch._C._nn.linear

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def tables() -> dict[str, CostTable]:
    """This process's cost tables: those of `kronbert calibrate`, else the shipped ones."""
    found, damaged = cpu_calibrate.tables()
    if damaged is not None:
        warnings.warn(
            f"{damaged}: this machine's calibration cannot be read, so the shipped one is used. "
            "Run `kronbert calibrate` to write it anew.",
            stacklevel=2,
        )
    return found


class Kept:
    """The ways one layer's product runs, by number of rows, and what they were made from."""

    __slots__ = ("bias", "dtype", "inner", "runs", "sources")

    def __init__(self, pairs: Pairs, bias: Tensor | None, inner: int) -> None:
        key = id(pairs[0][0])
        self.sources = [
            (weakref.ref(t, lambda _: _KEPT.pop(key, None)), t._version, t.data_ptr())
            for pair in pairs
            for t in pair
        ]
        self.bias = None if bias is None else weakref.ref(bias)
        self.dtype, self.inner = pairs[0][0].dtype, inner
        self.runs: dict[int, Run] = {}

    def holds(self, a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether the layer is the same and unchanged."""
        if len(self.sources) != 2 * len(a) or len(a) != len(b):
            return False
        if bias is not (None if self.bias is None else self.bias()):
            return False
        sources = iter(self.sources)
        for pair in zip(a, b, strict=True):
            for tensor in pair:
                source, version, address = next(sources)
                if source() is not tensor or tensor._version != version:
                    return False
                if tensor.data_ptr() != address:
                    return False
        return True


_KEPT: dict[int, Kept] = {}
"""By the id of a layer's first matrix; entries leave with their tensors."""


def recall(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None
) -> Tensor | None:
    """The product, if this layer ran before with as many rows (to a power of two) and none of it
    has changed since; else None. At one row of a narrow layer every check shows: 2 us in all."""
    kept = _KEPT.get(id(a[0])) if a else None
    if (
        kept is None
        or x.dtype is not kept.dtype
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or not kept.holds(a, b, bias)
    ):
        return None
    sizes = x.shape
    if not sizes or sizes[-1] != kept.inner:
        return None
    found = kept.runs.get((x.numel() // kept.inner).bit_length())
    return None if found is None else found(x, bias)


def linear(x: Tensor, pairs: Pairs, shapes: Groups, bias: Tensor | None) -> Tensor:
    """The checked product of x (..., in) with the groups ``pairs``: (..., out)."""
    operands = [x, *(t for pair in pairs for t in pair), *([] if bias is None else [bias])]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    n = x.numel() // x.shape[-1]
    keep = not torch.is_grad_enabled() and _keepable(pairs)
    forms = choose(shapes, x.dtype, n, fresh=not keep)
    if needs_grad:
        rows = x.reshape(n, x.shape[-1]).contiguous()
        return _sum(forms, shapes, rows, pairs, bias).view(*x.shape[:-1], shapes[0].out_features)
    call = _runner(forms, shapes, pairs)
    if keep and n:
        first = pairs[0][0]
        kept = _KEPT.get(id(first))
        a, b = zip(*pairs, strict=True)
        if kept is None or len(kept.sources) != 2 * len(a) or not kept.holds(a, b, bias):
            kept = Kept(pairs, bias, x.shape[-1])
            _KEPT[id(first)] = kept
        kept.runs[n.bit_length()] = call
    return call(x, bias)


def choose(shapes: Groups, dtype: torch.dtype, n: int, *, fresh: bool = False) -> tuple[Form, ...]:
    """The form of each group on n rows, or one `DENSE` for all; the same from one power of two to
    the next."""
    return _choose(DTYPES[dtype], shapes, n.bit_length(), fresh)


@cache
def _choose(dtype: str, shapes: Groups, bits: int, fresh: bool) -> tuple[Form, ...]:
    middle = 3 * 2 ** (bits - 2) if bits > 1 else 1
    return tables()[dtype].choose(shapes, middle, fresh=fresh)


def takes(x: Tensor, pairs: Pairs) -> bool:
    """Whether the engine runs this product: eager, on real CPU tensors of a dtype it knows."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(x) in PLAIN
        and all(type(t) in PLAIN for pair in pairs for t in pair)
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def in_place(x: Tensor) -> bool:
    """Whether what is made from x on the way may be written over: eager, no gradients, CPU."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and takes(x, ())
    )


def forget(tensors: Iterable[Tensor] | None = None) -> None:
    """Drop what was made from these matrices, or from all."""
    if tensors is None:
        _KEPT.clear()
    else:
        for tensor in tensors:
            _KEPT.pop(id(tensor), None)


def _runner(forms: tuple[Form, ...], shapes: Groups, pairs: Pairs) -> Run:
    """x (..., in), bias -> (..., out) without gradients, with matrices made once."""
    with torch.inference_mode(False), torch.no_grad():
        if forms == (DENSE,):
            dense = weight(*pairs[0])
            for pair in pairs[1:]:
                dense += weight(*pair)
            return partial(_dense, dense)
        ready = [
            # Cloned: a view would keep the parameter alive, and show changes half.
            (form, shape, tuple(matrix.clone() for matrix in prepare(form, *pair)))
            for form, shape, pair in zip(forms, shapes, pairs, strict=True)
        ]
    inner, out = shapes[0].in_features, shapes[0].out_features

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, inner).contiguous()
        form, shape, matrices = ready[0]
        y = run_in_chunks(form, shape, rows, matrices, bias)
        for form, shape, matrices in ready[1:]:
            y += run_in_chunks(form, shape, rows, matrices, None)
        return y.view(*x.shape[:-1], out)

    return call


def _dense(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on the kept weight; in bfloat16 its bias costs 3 us on few rows, an addition 1."""
    if bias is None or x.dtype is not torch.bfloat16 or x.shape[-1] * 16 < x.numel():
        return _linear(x, weight, bias)
    return _linear(x, weight).add_(bias)


def _sum(
    forms: tuple[Form, ...],
    shapes: Sequence[KroneckerShape],
    rows: Tensor,
    pairs: Pairs,
    bias: Tensor | None,
) -> Tensor:
    """The same with gradients."""
    if forms == (DENSE,):
        dense = weight(*pairs[0])
        for pair in pairs[1:]:
            dense = dense + weight(*pair)
        return run(DENSE, shapes[0], rows, (dense,), bias)
    y = run(forms[0], shapes[0], rows, prepare(forms[0], *pairs[0]), bias)
    for form, shape, pair in zip(forms[1:], shapes[1:], pairs[1:], strict=True):
        y = y + run(form, shape, rows, prepare(form, *pair))
    return y


def _keepable(pairs: Pairs) -> bool:
    """Inference tensors count no versions: a change of them would not be seen."""
    tensors = [t for pair in pairs for t in pair]
    return not any(t.is_inference() for t in tensors)
