"""The fused ends of an encoder layer as PyTorch ops: `residual_norm`, `linear_norm`, `ffn_norm`.

What holds for `kronbert.op_norm` holds here: rows in the ops ``kronbert::<name>``, any leading
dimensions in the functions, autocast, dropout from ``seed``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    residual_norm,
    rows_of,
)
from .shapes import KroneckerShape

__all__ = ["ffn_fits", "ffn_norm", "linear_norm", "residual_norm"]


def linear_norm(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    shift: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``LN(residual + dropout(kron_linear(x, a, b, shift)))``: x (..., in), residual (..., out).

    Groups a (rank, a_out, a_in), b (rank, b_out, b_in); shift (out) is the linear map's bias. One
    kernel where `kronbert.kernels.linear_norm.fits`, two where not."""
    keep = keeps(x, *a, *b, shift, residual, weight, bias)
    y, *_ = _linear_norm(
        rows_of(x), list(a), list(b), shift, rows_of(residual), weight, bias, eps, p, seed, keep
    )
    return y.view(residual.shape)


def ffn_norm(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str = "gelu",
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``LN(x + dropout(contract(gelu(expand(x)))))``: x (..., width) -> (..., width).

    expand = a1 ⊗ b1 with bias1, contract = a2 ⊗ b2 with bias2, for pairs that `ffn_fits`; the
    hidden layer is neither stored nor kept. activation: "gelu" (erf) or "gelu_fast"."""
    keep = keeps(x, a1, b1, bias1, a2, b2, bias2, weight, bias)
    y, *_ = _ffn_norm(
        rows_of(x), a1, b1, bias1, a2, b2, bias2, weight, bias, eps, activation, p, seed, keep
    )
    return y.view(x.shape)


def ffn_fits(expand: KroneckerShape, contract: KroneckerShape) -> bool:
    """Whether `ffn_norm` runs this pair: small a on both sides and one hidden slicing."""
    from .kernels import ffn

    return ffn.fits(expand, contract)


@torch.library.custom_op("kronbert::linear_norm", mutates_args=())
def _linear_norm(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    shift: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels import linear, linear_norm, norm

    x, shift, residual, weight, bias = contiguous(x, shift, residual, weight, bias)
    a, b = list(contiguous(*a)), list(contiguous(*b))
    if len(a) == 1 and linear_norm.fits(linear.shape_of(a[0], b[0]), x.dtype):
        out = linear_norm.linear_norm(
            x, a[0], b[0], shift, residual, weight, bias, eps, p=p, seed=seed, keep=keep
        )
    else:
        y = linear.linear(x, a, b)
        out = norm.residual_norm(
            y, residual, weight, bias, eps, shift=shift, p=p, seed=seed, keep=keep
        )
    return kept_of(out)


@_linear_norm.register_fake
def _(x: Tensor, a: list[Tensor], b: list[Tensor], *rest: Any) -> Kept:
    return new_kept(x, a[0].shape[1] * b[0].shape[1], rest[-1])


@torch.library.custom_op("kronbert::linear_norm_backward", mutates_args=())
def _linear_norm_backward(
    dy: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_shift: bool,
    has_bias: bool,
    needs: list[bool],
) -> list[Tensor]:
    """dshift, dresidual, dweight, dbias, dx, then da and db of each group.

    needs: whether of x, a, b; what is not needed or not there is empty."""
    from .kernels import linear_backward, norm

    dy, x, total, weight = contiguous(dy, x, total, weight)
    a, b = list(contiguous(*a)), list(contiguous(*b))
    out = norm.residual_norm_backward(
        dy, total, mean, rstd, weight, p=p, seed=seed, has_bias=has_bias, has_shift=has_shift
    )
    with torch.autocast(x.device.type, enabled=False):  # gradients keep the dtype of forward
        dx, da, db, _ = linear_backward.linear_backward(
            out.dx, x, a, b, None, None, (needs[0], needs[1], needs[2], False)
        )
    nothing: list[Tensor | None] = [None] * len(a)
    ends = (out.dshift, out.dtotal, out.dweight, out.dbias)
    return or_empty(dy, *ends, dx, *(da or nothing), *(db or nothing))


@_linear_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    has_shift: bool,
    has_bias: bool,
    needs: list[bool],
) -> list[Tensor]:
    return or_empty(
        dy,
        weight.new_empty(weight.shape) if has_shift else None,
        dy.new_empty(dy.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape) if has_bias else None,
        x.new_empty(x.shape) if needs[0] else None,
        *(one.new_empty(one.shape) if needs[1] else None for one in a),
        *(one.new_empty(one.shape) if needs[2] else None for one in b),
    )


def _linear_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Kept) -> None:
    x, a, b, shift, _, weight, bias, _, p, seed, keep = inputs
    require_kept("linear_norm", keep)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight, seed, *a, *b)
    ctx.p, ctx.has_shift, ctx.has_bias = p, shift is not None, bias is not None


def _linear_norm_gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, total, mean, rstd, weight, seed, *matrices = ctx.saved_tensors
    groups = len(matrices) // 2
    if dy is None:
        return None, [None] * groups, [None] * groups, *(None,) * 8
    a, b = matrices[:groups], matrices[groups:]
    # Of a list, one answer per matrix: all are computed when one is asked for.
    needs = [any(need) if isinstance(need, list | tuple) else need for need in ctx.needs_input_grad]
    needs_x, needs_a, needs_b = needs[:3]
    dshift, dresidual, dweight, dbias, dx, *found = _linear_norm_backward(
        dy, x, a, b, total, mean, rstd, weight, ctx.p, seed, ctx.has_shift, ctx.has_bias, needs[:3]
    )
    return (
        dx if needs_x else None,
        found[:groups] if needs_a else [None] * groups,
        found[groups:] if needs_b else [None] * groups,
        dshift if ctx.has_shift else None,
        dresidual,
        dweight,
        dbias if ctx.has_bias else None,
        *(None,) * 4,
    )


@torch.library.custom_op("kronbert::ffn_norm", mutates_args=())
def _ffn_norm(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, then if kept z (n, h_in, rank1, c), total, mean, rstd."""
    from .kernels import ffn

    x, a1, b1, bias1, a2, b2, bias2, weight, bias = contiguous(
        x, a1, b1, bias1, a2, b2, bias2, weight, bias
    )
    out = ffn.ffn_norm(
        x,
        a1,
        b1,
        bias1,
        a2,
        b2,
        bias2,
        weight,
        bias,
        eps,
        activation=activation,
        p=p,
        seed=seed,
        keep=keep,
    )
    y, total, mean, rstd = kept_of(out)
    (z,) = or_empty(y, out.z)
    return y, z, total, mean, rstd


@_ffn_norm.register_fake
def _(x: Tensor, a1: Tensor, b1: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    keep = rest[-1]
    y, total, mean, rstd = new_kept(x, x.shape[1], keep)
    z = x.new_empty(x.shape[0], a1.shape[2], *b1.shape[:2]) if keep else x.new_empty(0)
    return y, z, total, mean, rstd


@torch.library.custom_op("kronbert::ffn_norm_backward", mutates_args=())
def _ffn_norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    weight: Tensor,
    activation: str,
    p: float,
    seed: Tensor | None,
    has_bias2: bool,
    has_bias: bool,
) -> list[Tensor]:
    """dx, da1, db1, dbias1, da2, db2, dbias2, dweight, dbias; empty for a bias not given."""
    from .kernels import ffn

    dy, x, z, total = contiguous(dy, x, z, total)
    with torch.autocast(x.device.type, enabled=False):  # gradients keep the dtype of forward
        out = ffn.ffn_norm_backward(
            dy,
            x,
            z,
            total,
            mean,
            rstd,
            *contiguous(a1, b1, bias1, a2, b2, weight),
            activation=activation,
            p=p,
            seed=seed,
            has_bias2=has_bias2,
            has_bias=has_bias,
        )
    return or_empty(dy, *out)


@_ffn_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    weight: Tensor,
    activation: str,
    p: float,
    seed: Tensor | None,
    has_bias2: bool,
    has_bias: bool,
) -> list[Tensor]:
    like = (
        x,
        a1,
        b1,
        bias1,
        a2,
        b2,
        weight if has_bias2 else None,
        weight,
        weight if has_bias else None,
    )
    return or_empty(dy, *(None if t is None else t.new_empty(t.shape) for t in like))


def _ffn_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, a1, b1, bias1, a2, b2, bias2, weight, bias, _, activation, p, seed, keep = inputs
    require_kept("ffn_norm", keep)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], a1, b1, bias1, a2, b2, weight, seed)
    ctx.activation, ctx.p = activation, p
    ctx.has = (bias1 is not None, bias2 is not None, bias is not None)


def _ffn_norm_gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 14
    *tensors, seed = ctx.saved_tensors
    has_bias1, has_bias2, has_bias = ctx.has
    found: list[Tensor | None] = list(
        _ffn_norm_backward(dy, *tensors, ctx.activation, ctx.p, seed, has_bias2, has_bias)
    )
    for i, has in ((3, has_bias1), (6, has_bias2), (8, has_bias)):
        found[i] = found[i] if has else None
    return *found, *(None,) * 5


register(
    "linear_norm", _linear_norm, _linear_norm_gradients, _linear_norm_setup, _linear_norm_backward
)
register("ffn_norm", _ffn_norm, _ffn_norm_gradients, _ffn_norm_setup, _ffn_norm_backward)
