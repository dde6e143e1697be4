"""The ops `kronbert::kron_linear` and `kronbert::kron_qkv`: Triton kernels with autograd.

Defined by `kronbert.reference.kron_linear`. Each backward is an op of its own, so `torch.compile`
sees four opaque calls. Kernels are imported when an op runs; nothing here asks for a GPU, but on a
CPU they run only in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import KronbertError


def kron_linear(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x · (sum_r a[r] ⊗ b[r])ᵀ + bias)``: x (..., in) -> (..., out), groups summed.

    a (rank, a_out, a_in), b (rank, b_out, b_in) per group; activation None, "gelu" or "gelu_fast".
    Raises `ShapeError` for tensors that do not go together, or a dtype kernels do not have."""
    rows = x.reshape(-1, x.shape[-1])
    y = _kron_linear(rows, list(a), list(b), bias, activation or "")
    return y.view(*x.shape[:-1], y.shape[-1])


def kron_qkv(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Three maps of one x (..., in), each one group and all of one shape -> three (..., out).

    a, b: three of each; bias: three or none. Raises `ShapeError` where the shapes differ: call
    `kron_linear` three times there."""
    rows = x.reshape(-1, x.shape[-1])
    q, k, v = _kron_qkv(rows, list(a), list(b), list(bias))
    shape = (*x.shape[:-1], q.shape[-1])
    return q.view(shape), k.view(shape), v.view(shape)


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("kronbert::kron_linear", mutates_args=())
def _kron_linear(
    x: Tensor, a: list[Tensor], b: list[Tensor], bias: Tensor | None, activation: str
) -> Tensor:
    from .kernels.linear import linear

    bias = None if bias is None else bias.contiguous()
    name: Any = activation or None
    return linear(x.contiguous(), _plain(a), _plain(b), bias, name)


@_kron_linear.register_fake
def _(x: Tensor, a: list[Tensor], b: list[Tensor], bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], a[0].shape[1] * b[0].shape[1])


@torch.library.custom_op("kronbert::kron_linear_backward", mutates_args=())
def _kron_linear_backward(
    dy: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    bias: Tensor | None,
    activation: str,
    need: list[bool],
) -> list[Tensor]:
    """dx, da of each group, db of each group, dbias: those of the four that ``need`` names."""
    from .kernels.linear_backward import linear_backward

    bias = None if bias is None else bias.contiguous()
    name: Any = activation or None
    needs = (need[0], need[1], need[2], need[3])
    with torch.autocast(x.device.type, enabled=False):  # gradients keep the dtype of forward
        dx, da, db, dbias = linear_backward(
            dy.contiguous(), x.contiguous(), _plain(a), _plain(b), bias, name, needs
        )
    found = [dx, *(da or []), *(db or []), dbias]
    return [tensor for tensor in found if tensor is not None]


@_kron_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    bias: Tensor | None,
    activation: str,
    need: list[bool],
) -> list[Tensor]:
    given = [[x], a, b, [] if bias is None else [bias]]
    return _like(
        [one for group, needed in zip(given, need, strict=True) if needed for one in group]
    )


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, b, bias, activation = inputs
    ctx.groups, ctx.bias, ctx.activation = len(a), bias is not None, activation
    ctx.save_for_backward(x, *a, *b, *(() if bias is None else (bias,)))


def _backward_linear(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    groups = ctx.groups
    a, b, bias = rest[:groups], rest[groups : 2 * groups], rest[-1] if ctx.bias else None
    need = _needed(ctx)
    found = _kron_linear_backward(dy, x, a, b, bias, ctx.activation, need)
    dx, da, db, dbias = _grouped(found, need, groups, 1)
    return (dx[0], da, db, dbias[0], None)


def _needed(ctx: Any) -> list[bool]:
    """Which of x, a, b and the bias (or biases) want a gradient; a list does if one of it does."""
    needs = ctx.needs_input_grad[:4]
    return [any(need) if isinstance(need, list | tuple) else need for need in needs]


def _grouped(
    found: list[Tensor], need: list[bool], groups: int, biases: int
) -> list[list[Tensor | None]]:
    """The gradients of x, a, b and the biases; None for those not computed."""
    left = iter(found)
    sizes = (1, groups, groups, biases)
    return [
        [next(left) if needed else None for _ in range(size)]
        for size, needed in zip(sizes, need, strict=True)
    ]


@torch.library.custom_op("kronbert::kron_qkv", mutates_args=())
def _kron_qkv(
    x: Tensor, a: list[Tensor], b: list[Tensor], bias: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.linear import qkv

    return qkv(x.contiguous(), _plain(a), _plain(b), _plain(bias) or (None, None, None))


@_kron_qkv.register_fake
def _(
    x: Tensor, a: list[Tensor], b: list[Tensor], bias: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape[0], a[0].shape[1] * b[0].shape[1]) for _ in range(3))
    return q, k, v


@torch.library.custom_op("kronbert::kron_qkv_backward", mutates_args=())
def _kron_qkv_backward(
    dy: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor],
    need: list[bool],
) -> list[Tensor]:
    """dx, three da, three db, three dbias: those of the four that ``need`` names."""
    from .kernels.linear_backward import qkv_backward

    needs = (need[0], need[1], need[2], need[3])
    with torch.autocast(x.device.type, enabled=False):  # gradients keep the dtype of forward
        dx, da, db, dbias = qkv_backward(
            _plain(dy), x.contiguous(), _plain(a), _plain(b), bool(bias), needs
        )
    return [*([] if dx is None else [dx]), *(da or []), *(db or []), *(dbias or [])]


@_kron_qkv_backward.register_fake
def _(
    dy: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor],
    need: list[bool],
) -> list[Tensor]:
    given = zip(([x], a, b, bias), need, strict=True)
    return _like([one for group, needed in given if needed for one in group])


def _setup_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, a, b, bias = inputs
    ctx.biases = len(bias)
    ctx.save_for_backward(x, *a, *b, *bias)


def _backward_qkv(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    need = _needed(ctx)
    found = _kron_qkv_backward(list(dy), x, rest[:3], rest[3:6], rest[6:], need)
    dx, da, db, dbias = _grouped(found, need, 3, ctx.biases)
    return (dx[0], da, db, dbias)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise KronbertError(
        "kron_linear, kron_qkv: no second derivative: the kernels have a first one only. "
        "Differentiate twice through kronbert.reference.kron_linear, or on a model after "
        "kronbert.unfuse(model)."
    )


_kron_linear.register_autograd(_backward_linear, setup_context=_setup_linear)
_kron_linear_backward.register_autograd(_refuse)
_kron_qkv.register_autograd(_backward_qkv, setup_context=_setup_qkv)
_kron_qkv_backward.register_autograd(_refuse)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        keep = value.dtype == torch.float64 or not value.is_floating_point()
        return value if keep else value.to(dtype)
    return [_cast(one, dtype) for one in value] if isinstance(value, list) else value


def _autocast(op: Any, device: str) -> Callable[..., Any]:
    """Cast every float to the dtype of the autocast in force. `torch.library.register_autocast`
    takes one dtype when the op is made, before anyone has chosen it."""

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(*(_cast(value, dtype) for value in args))

    return cast_and_call


_AUTOCAST = torch.library.Library("kronbert", "FRAGMENT")
for _name, _op in (("kron_linear", _kron_linear), ("kron_qkv", _kron_qkv)):
    _AUTOCAST.impl(_name, _autocast(_op, "cuda"), "AutocastCUDA")
    _AUTOCAST.impl(_name, _autocast(_op, "cpu"), "AutocastCPU")
