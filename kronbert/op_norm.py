"""``kronbert::residual_norm`` as a PyTorch op, and what the ops of fused layers share.

An op runs the Triton kernels on rows (n, width), its backward is an op of its own; the function
takes any leading dimensions and decides what is kept for backward. Under autocast every float
operand is cast and the result is in the autocast dtype. Dropout draws from ``seed``, an int64
tensor of one element on x's device: drawn anew by the caller with `torch.randint`, it follows
`torch.manual_seed` and is drawn again in a replayed CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import KronbertError

Kept = tuple[Tensor, Tensor, Tensor, Tensor]
"""y (n, width), and if kept: total (n, width), mean (n,), rstd (n,), else empty ones. total is also
empty where it would be x."""


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``LN(residual + dropout(x)) * weight + bias``: x, residual (..., width), weight (width)."""
    rows, beside = rows_of(x), None if residual is None else rows_of(residual)
    keep = keeps(x, residual, weight, bias)
    y, *_ = _residual_norm(rows, beside, weight, bias, eps, p, seed, keep)
    return y.view(x.shape)


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def keeps(*tensors: Tensor | None) -> bool:
    """Whether backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, contiguous."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def or_empty(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with an empty one for None: what an op may return."""
    return [like.new_empty(0) if t is None else t for t in tensors]


def new_kept(x: Tensor, width: int, keep: bool, total: bool = True) -> Kept:
    """What the ops return, for `torch.compile`: sizes and dtypes alone."""
    n = x.shape[0] if keep else 0
    return (
        x.new_empty(x.shape[0], width),
        x.new_empty(n, width) if keep and total else x.new_empty(0),
        x.new_empty(n, dtype=torch.float32),
        x.new_empty(n, dtype=torch.float32),
    )


def kept_of(out: Any) -> Kept:
    (total,) = or_empty(out.y, out.total)
    mean, rstd = or_empty(out.y.new_empty(0, dtype=torch.float32), out.mean, out.rstd)
    return out.y, total, mean, rstd


@torch.library.custom_op("kronbert::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels import norm

    x, residual, weight, bias = contiguous(x, residual, weight, bias)
    return kept_of(norm.residual_norm(x, residual, weight, bias, eps, p=p, seed=seed, keep=keep))


@_residual_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> Kept:
    return new_kept(x, x.shape[1], keep, residual is not None or p > 0)


@torch.library.custom_op("kronbert::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    dy: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_bias: bool,
    has_residual: bool,
) -> list[Tensor]:
    """dx, dresidual (empty where it is dx), dweight, dbias."""
    from .kernels import norm

    dy, total, weight = contiguous(dy, total, weight)
    out = norm.residual_norm_backward(
        dy,
        total,
        mean,
        rstd,
        weight,
        p=p,
        seed=seed,
        has_bias=has_bias,
        has_residual=has_residual and p > 0,
    )
    return or_empty(dy, out.dx, out.dtotal, out.dweight, out.dbias)


@_residual_norm_backward.register_fake
def _(
    dy: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_bias: bool,
    has_residual: bool,
) -> list[Tensor]:
    dx = dy.new_empty(dy.shape)
    dresidual = dy.new_empty(dy.shape if has_residual and p > 0 else 0)
    dweight = weight.new_empty(weight.shape)
    return [dx, dresidual, dweight, torch.empty_like(dweight) if has_bias else dy.new_empty(0)]


def _residual_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Kept) -> None:
    x, residual, weight, bias, _, p, seed, keep = inputs
    _, total, mean, rstd = output
    require_kept("residual_norm", keep)
    ctx.set_materialize_grads(False)
    total = total if residual is not None or p > 0 else x
    ctx.save_for_backward(total, mean, rstd, weight, seed)
    ctx.p, ctx.has_bias, ctx.has_residual = p, bias is not None, residual is not None


def _residual_norm_gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    total, mean, rstd, weight, seed = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _residual_norm_backward(
        dy, total, mean, rstd, weight, ctx.p, seed, ctx.has_bias, ctx.has_residual
    )
    if not ctx.has_residual:
        dresidual = None
    elif ctx.p == 0:
        dresidual = dx
    return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None, None, None


def require_kept(op: str, keep: bool) -> None:
    if not keep:
        raise KronbertError(
            f"kronbert::{op}: a gradient was asked for with keep=False. Call "
            f"kronbert.blocks.{op}, or pass keep=True, or use torch.no_grad()."
        )


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise KronbertError(
        "residual_norm, add_norm, linear_norm, ffn_norm, gated: no second derivative: the fused "
        "kernels have a first one only. Differentiate twice on a model after "
        "kronbert.unfuse(model)."
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """As autocast casts: every float tensor except float64, in lists too."""
    if isinstance(value, list | tuple):
        return [_cast(one, dtype) for one in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def _autocast(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``op`` with its operands in the dtype that autocast has when it is called."""

    def cast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(*_cast(args, dtype))

    return cast


_LIBRARY = torch.library.Library("kronbert", "FRAGMENT")  # its registrations end with it


def register(
    name: str,
    op: Any,
    gradients: Callable[..., Any],
    setup: Callable[..., Any],
    backward: Any,
    *,
    autocast: bool = True,
) -> None:
    """Give ``kronbert::<name>`` its autograd and autocast; its backward op refuses a second one.

    autocast False: the operands keep their dtype."""
    op.register_autograd(gradients, setup_context=setup)
    backward.register_autograd(_refuse)
    for device in ("cuda", "cpu") if autocast else ():
        # Not register_autocast: that takes one dtype, autocast's own is float16 or bfloat16.
        _LIBRARY.impl(name, _autocast(op, device), f"Autocast{device.upper()}")


register(
    "residual_norm",
    _residual_norm,
    _residual_norm_gradients,
    _residual_norm_setup,
    _residual_norm_backward,
)
