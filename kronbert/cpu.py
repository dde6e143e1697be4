"""The CPU engine: picks a form for every product and keeps its matrices while nothing changes.

Which form runs is predicted from tables (`kronbert.cpu_cost`): calibrated on this machine, or
shipped. Without gradients, in eager mode, the matrices that a form multiplies with (folded,
transposed or dense) are kept until the layer's parameters change; with gradients they are made
anew. Parameters that change behind torch's back, through ``param.data``, by a collective of
`torch.distributed` or in place through the vector that `nn.utils.vector_to_parameters` made them
views of, are not seen: call `forget`, or ``module.train()`` or ``module.eval()``, which do so for a
module's parameters.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import cpu_calibrate, native
from .cpu_cost import CostTable
from .forms import (
    DENSE,
    FEW_ROWS,
    Form,
    Matrices,
    chunk_rows,
    packed,
    plain_product,
    prepare,
    ready,
    run,
    run_in_chunks,
    weight,
)
from .shapes import Groups, KroneckerShape

Pairs = Sequence[tuple[Tensor, Tensor]]
Run = Callable[[Tensor, Tensor | None], Tensor]
Key = int | tuple[str, int]

PLAIN = (Tensor, nn.Parameter)
"""Tensors whose numbers can be read: no fake, batched or otherwise wrapped ones."""

_linear = torch._C._nn.linear
_tracing = torch._C._get_tracing_state
_transform_level = torch._C._functorch.maybe_current_level
_modes = torch._C._len_torch_dispatch_stack

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
    """The ways one product runs, by number of rows, and what they were made from."""

    __slots__ = ("bias", "dtype", "inner", "made", "runs", "sources", "storages")

    def __init__(self, key: Key, pairs: Pairs, bias: Tensor | None, inner: int) -> None:
        matrices = (*(a for a, _ in pairs), *(b for _, b in pairs))
        self.sources = [
            (weakref.ref(t, lambda _: _KEPT.pop(key, None)), t._version, t.data_ptr())
            for t in matrices
        ]
        self.storages = [t.untyped_storage() for t in matrices]
        """So that no other numbers come to lie at their address: ``t.data = ...``, as
        `nn.utils.vector_to_parameters` writes it, counts no version."""
        self.bias = None if bias is None else weakref.ref(bias)
        """The last one a product was checked with; no matrix depends on it."""
        self.dtype, self.inner = pairs[0][0].dtype, inner
        self.runs: dict[int, Any] = {}
        self.made: dict[Any, Any] = {}
        """By what its matrices depend on: numbers of rows share them."""

    def run(self, of: Any, make: Callable[[], Any]) -> Any:
        """What was made ``of`` this, or is now."""
        if of not in self.made:
            self.made[of] = make()
        return self.made[of]

    def knows(self, bias: Tensor | None) -> bool:
        """Whether a product with this bias, or none, needs no checks of it."""
        return bias is None or (self.bias is not None and self.bias() is bias)

    def holds(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        """Whether the matrices are the same and unchanged."""
        tensors = (*a, *b)
        if len(tensors) != len(self.sources) or len(a) != len(b):
            return False
        for tensor, (source, version, address) in zip(tensors, self.sources, strict=True):
            if source() is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


_KEPT: dict[Key, Kept] = {}
"""A layer's under the id of its first matrix; entries leave with their tensors."""


def kept(key: Key, pairs: Pairs, bias: Tensor | None, inner: int) -> Kept:
    """What is kept under ``key``: made from these matrices as they are, else new and empty. With
    another bias, or without one, a product has the same matrices."""
    found = _KEPT.get(key)
    a, b = zip(*pairs, strict=True)
    if found is None or not found.holds(a, b):
        _forget_after_steps()
        found = _KEPT[key] = Kept(key, pairs, bias, inner)
    elif bias is not None and not found.knows(bias):
        found.bias = weakref.ref(bias)
    return found


def recall(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None
) -> Tensor | None:
    """The product, if this layer ran before with as many rows (to a power of two) and none of it
    has changed since; else None. At one row of a narrow layer every check shows: 2 us in all."""
    found = _KEPT.get(id(a[0])) if a else None
    if (
        found is None
        or x.dtype is not found.dtype
        or type(x) is not Tensor
        or not x.is_cpu
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not _eager()
        or not found.knows(bias)
        or not found.holds(a, b)
    ):
        return None
    sizes = x.shape
    if not sizes or sizes[-1] != found.inner:
        return None
    call = found.runs.get(bucket(x.numel() // found.inner))
    return None if call is None else call(x, bias)


def linear(x: Tensor, pairs: Pairs, shapes: Groups, bias: Tensor | None) -> Tensor:
    """The checked product of x (..., in) with the groups ``pairs``: (..., out)."""
    operands = [x, *(t for pair in pairs for t in pair), *([] if bias is None else [bias])]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    n = x.numel() // x.shape[-1]
    # What autocast cast is new in every call: nothing made of it would be used again.
    keep = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    keep = keep and _keepable(pairs)
    forms = choose(shapes, x.dtype, n, fresh=not keep)
    if needs_grad:
        rows = x.reshape(n, x.shape[-1]).contiguous()
        return _sum(forms, shapes, rows, pairs, bias).view(*x.shape[:-1], shapes[0].out_features)
    if not keep or not n:
        return _runner(forms, shapes, pairs, n)(x, bias)
    found = kept(id(pairs[0][0]), pairs, bias, x.shape[-1])
    call = found.run((forms, layout(x.dtype, n)), lambda: _runner(forms, shapes, pairs, n))
    found.runs[bucket(n)] = call
    return call(x, bias)


def layout(dtype: torch.dtype, n: int) -> int:
    """Numbers of rows whose matrices are laid out alike: all in float32, see `forms.packed`."""
    return bucket(n) if dtype == torch.bfloat16 else 0


def bucket(n: int) -> int:
    """Numbers of rows that run alike: each up to 4, then from one power of two to the next."""
    return n if n <= 4 else n.bit_length() + 2


def choose(shapes: Groups, dtype: torch.dtype, n: int, *, fresh: bool = False) -> tuple[Form, ...]:
    """The form of each group on n rows, or one `DENSE` for all; the same in a whole `bucket`."""
    return _choose(DTYPES[dtype], shapes, bucket(max(n, 1)), fresh)


@cache
def _choose(dtype: str, shapes: Groups, rows: int, fresh: bool) -> tuple[Form, ...]:
    middle = rows if rows <= 4 else 3 * 2 ** (rows - 4)
    return tables()[dtype].choose(shapes, middle, fresh=fresh)


def takes(x: Tensor, pairs: Pairs) -> bool:
    """Whether the engine runs this product: eager, on real CPU tensors of a dtype it knows."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and all(type(t) in PLAIN for pair in pairs for t in pair)
        and _eager()
    )


def _eager() -> bool:
    """No tracer, transformation or mode looks on: they refuse ``out=`` or keep what they see."""
    return (
        _tracing() is None
        and _transform_level() is None
        and not _modes()
        and forward_ad._current_level < 0
    )


def in_place(x: Tensor) -> bool:
    """Whether what is made from x on the way may be written over: eager, no gradients, CPU."""
    return not torch.is_grad_enabled() and x.is_cpu and takes(x, ())


def forget(tensors: Iterable[Tensor] | None = None) -> None:
    """Drop what was made from these matrices, or from all."""
    if tensors is None:
        _KEPT.clear()
    elif _KEPT:
        changed = {id(tensor) for tensor in tensors}
        for key, kept in list(_KEPT.items()):
            if any(id(source()) in changed for source, _, _ in kept.sources):
                _KEPT.pop(key, None)


@cache
def _forget_after_steps() -> None:
    """Fused optimizers count no versions (torch 2.13): forget what one has stepped."""

    def stepped(optimizer: Any, *_: Any) -> None:
        forget(tensor for group in optimizer.param_groups for tensor in group["params"])

    register_optimizer_step_post_hook(stepped)


def _runner(forms: tuple[Form, ...], shapes: Groups, pairs: Pairs, n: int) -> Run:
    """x (..., in), bias -> (..., out) without gradients, with matrices made once for about n
    rows."""
    with torch.inference_mode(False), torch.no_grad():
        if forms == (DENSE,):
            dense = weight(*pairs[0])
            for pair in pairs[1:]:
                dense += weight(*pair)
            return partial(_dense, packed(dense, n))
        kernels = native.library() is not None
        parts = [
            _ready(form, shape, pair, n, kernels)
            for form, shape, pair in zip(forms, shapes, pairs, strict=True)
        ]
    inner, out = shapes[0].in_features, shapes[0].out_features
    step = min(chunk_rows(form, shape, pairs[0][0].element_size()) for form, shape, _ in parts)

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, inner).contiguous()
        bias = None if bias is None else bias.contiguous()
        each = run if rows.shape[0] <= step else run_in_chunks
        form, shape, matrices = parts[0]
        y = each(form, shape, rows, matrices, bias, kernels=kernels)
        for form, shape, matrices in parts[1:]:
            y += each(form, shape, rows, matrices, None, kernels=kernels)
        return y.view(*x.shape[:-1], out)

    return call


def _ready(
    form: Form, shape: KroneckerShape, pair: tuple[Tensor, Tensor], n: int, kernels: bool
) -> tuple[Form, KroneckerShape, Matrices]:
    """Matrices of their own: a view would keep the parameter alive, and show changes half. The C
    kernels read them line by line, whatever the parameter's strides."""
    plain = torch.contiguous_format
    matrices = tuple(matrix.clone(memory_format=plain) for matrix in prepare(form, *pair))
    return form, shape, ready(form, shape, matrices, n, kernels=kernels)


def _dense(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a kept dense matrix. In float32 a bias costs less after it, but on few
    rows."""
    if matrix.is_mkldnn:
        return plain_product(x.contiguous(), matrix, None if bias is None else bias.contiguous())
    if bias is None or x.numel() <= FEW_ROWS * x.shape[-1]:
        return plain_product(x, matrix, bias)
    return plain_product(x, matrix).add_(bias)


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
