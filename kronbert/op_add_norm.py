"""``kronbert::add_norm`` as a PyTorch op: the residual sum of a pre-norm layer, and its LayerNorm.

What holds for `kronbert.op_norm` holds here, but for autocast: the sum is the stream that runs
through all layers, which eager PyTorch keeps in the wider dtype of its two terms; cast to half at
every layer it would lose what the layers add. So the op takes its operands as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .op_norm import (
    Kept,
    contiguous,
    keeps,
    kept_of,
    new_kept,
    or_empty,
    register,
    require_kept,
    rows_of,
)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = residual + dropout(x)`` and ``LN(total) * weight + bias``: all (..., width).

    Both in the wider dtype of x and residual. One kernel; backward keeps the sum, which the caller
    holds anyway."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    rows, beside = rows_of(x.to(dtype)), rows_of(residual.to(dtype))
    keep = keeps(x, residual, weight, bias)
    y, total, *_ = _add_norm(rows, beside, weight, bias, eps, p, seed, keep)
    return total.view(x.shape), y.view(x.shape)


@torch.library.custom_op("kronbert::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total (n, width); then if kept mean (n,), rstd (n,), else empty ones."""
    from .kernels import norm

    x, residual, weight, bias = contiguous(x, residual, weight, bias)
    return kept_of(
        norm.residual_norm(x, residual, weight, bias, eps, p=p, seed=seed, keep=keep, total=True)
    )


@_add_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> Kept:
    y, _, mean, rstd = new_kept(x, x.shape[1], keep)
    return y, torch.empty_like(y), mean, rstd


@torch.library.custom_op("kronbert::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    added: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_bias: bool,
) -> list[Tensor]:
    """dx, dresidual (empty where it is dx), dweight, dbias; added is the sum's own gradient."""
    from .kernels import norm

    dy, added, total, weight = contiguous(dy, added, total, weight)
    out = norm.residual_norm_backward(
        dy,
        total,
        mean,
        rstd,
        weight,
        added=added,
        p=p,
        seed=seed,
        has_bias=has_bias,
        has_residual=p > 0,
    )
    return or_empty(dy, out.dx, out.dtotal, out.dweight, out.dbias)


@_add_norm_backward.register_fake
def _(
    dy: Tensor,
    added: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_bias: bool,
) -> list[Tensor]:
    return or_empty(
        dy,
        dy.new_empty(dy.shape),
        dy.new_empty(dy.shape) if p > 0 else None,
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape) if has_bias else None,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Kept) -> None:
    _, _, weight, bias, _, p, seed, keep = inputs
    require_kept("add_norm", keep)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], weight, seed)
    ctx.p, ctx.has_bias = p, bias is not None


def _gradients(
    ctx: Any, dy: Tensor | None, added: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    if dy is None and added is None:
        return (None,) * 8
    total, mean, rstd, weight, seed = ctx.saved_tensors
    if dy is None:  # only the sum was used
        dy = torch.zeros_like(total)
    dx, dresidual, dweight, dbias = _add_norm_backward(
        dy, added, total, mean, rstd, weight, ctx.p, seed, ctx.has_bias
    )
    dresidual = dresidual if ctx.p > 0 else dx
    return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None, None, None


register("add_norm", _add_norm, _gradients, _setup, _add_norm_backward, autocast=False)
