"""``kronbert::gated`` as a PyTorch op: the gate of a GeGLU feed-forward layer.

What holds for `kronbert.op_norm` holds here: rows in the op, any leading dimensions in the
function, autocast, dropout from ``seed``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .op_norm import contiguous, register, rows_of


def gated(
    pair: Tensor, *, activation: str = "gelu", p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``dropout(gelu(u) * g)``: pair (..., 2 * width), u its first half, g its second.

    activation: "gelu" (erf) or "gelu_fast". Backward keeps ``pair`` and nothing else."""
    y: Tensor = _gated(rows_of(pair), activation, p, seed)
    return y.view(*pair.shape[:-1], y.shape[1])


@torch.library.custom_op("kronbert::gated", mutates_args=())
def _gated(pair: Tensor, activation: str, p: float, seed: Tensor | None) -> Tensor:
    from .kernels import gated as kernel

    (pair,) = contiguous(pair)
    return kernel.gated(pair, activation, p=p, seed=seed)


@_gated.register_fake
def _(pair: Tensor, activation: str, p: float, seed: Tensor | None) -> Tensor:
    return pair.new_empty(pair.shape[0], pair.shape[1] // 2)


@torch.library.custom_op("kronbert::gated_backward", mutates_args=())
def _gated_backward(
    dy: Tensor, pair: Tensor, activation: str, p: float, seed: Tensor | None
) -> Tensor:
    from .kernels import gated as kernel

    dy, pair = contiguous(dy, pair)
    return kernel.gated_backward(dy, pair, activation, p=p, seed=seed)


@_gated_backward.register_fake
def _(dy: Tensor, pair: Tensor, activation: str, p: float, seed: Tensor | None) -> Tensor:
    return pair.new_empty(pair.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pair, activation, p, seed = inputs
    ctx.save_for_backward(pair, seed)
    ctx.activation, ctx.p = activation, p


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    pair, seed = ctx.saved_tensors
    return _gated_backward(dy, pair, ctx.activation, ctx.p, seed), None, None, None


register("gated", _gated, _gradients, _setup, _gated_backward)
