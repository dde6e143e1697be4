"""The gate of a GeGLU feed-forward layer, ``dropout(gelu(u) * g)``; its backward.

u and g lie side by side in one row, as one linear map made them. Backward computes gelu and its
derivative anew from u: forward keeps nothing of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from .gelu import activate, activate_grad, require_activation
from .norm_tile import dropout, kept, require_dtype, require_rows, require_size

ROWS, COLUMNS, WARPS = 8, 128, 4
"""A program's tile. Not timed: eight numbers a thread, 16 bytes in half precision, which is the
widest load; 128 divides ModernBERT-base's 1,152."""


@triton.jit
def _gated_kernel(
    pair,
    y,
    seed,
    n,
    threshold,
    scale,
    width: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    cols = first + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < n)[:, None] & (cols < width)
    at = pair + rows[:, None] * (2 * width) + cols
    u = tl.load(at, mask=mask, other=0).to(tl.float32)
    g = tl.load(at + width, mask=mask, other=0).to(tl.float32)
    made = activate(u, ACT) * g
    if scale is not None:
        bits = kept(seed, rows, width, first, COLUMNS)
        made = tl.where(bits >= threshold, made * scale, 0.0)
    tl.store(y + rows[:, None] * width + cols, made.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward_kernel(
    dy,
    pair,
    dpair,
    seed,
    n,
    threshold,
    scale,
    width: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    cols = first + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < n)[:, None] & (cols < width)
    offset = rows[:, None] * (2 * width) + cols
    u = tl.load(pair + offset, mask=mask, other=0).to(tl.float32)
    g = tl.load(pair + offset + width, mask=mask, other=0).to(tl.float32)
    grad = tl.load(dy + rows[:, None] * width + cols, mask=mask, other=0).to(tl.float32)
    if scale is not None:
        bits = kept(seed, rows, width, first, COLUMNS)
        grad = tl.where(bits >= threshold, grad * scale, 0.0)
    kind = dpair.dtype.element_ty
    tl.store(dpair + offset, (grad * g * activate_grad(u, ACT)).to(kind), mask=mask)
    tl.store(dpair + offset + width, (grad * activate(u, ACT)).to(kind), mask=mask)


def gated(
    pair: Tensor, activation: str | None = "gelu", *, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``dropout(gelu(u) * g)``: pair (n, 2 * width), u its first half, g its second -> (n, width).

    activation: "gelu" (erf), "gelu_fast", or None for a plain product. p: dropout's probability,
    seed: int64 of one element on pair's device. Defined by ``F.gelu(u) * g``, but rounded
    once. Raises `ShapeError` for rows that have no halves."""
    width = _width("gated", pair)
    act = require_activation("gated", activation)
    require_rows("gated", pair=pair, seed=seed)
    require_dtype("gated", pair=pair)
    drop = dropout("gated", p, seed)
    n = pair.shape[0]
    y = pair.new_empty(n, width)
    if y.numel():
        with torch.cuda.device_of(pair):
            _gated_kernel[_grid(n, width)](
                pair, y, drop.seed, n, drop.threshold, drop.scale, width, **_tile(act)
            )
    return y


def gated_backward(
    dy: Tensor,
    pair: Tensor,
    activation: str | None = "gelu",
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gradient of `gated`'s pair (n, 2 * width) from dy (n, width).

    The same p and seed drop the same places."""
    width = _width("gated_backward", pair)
    act = require_activation("gated_backward", activation)
    n = pair.shape[0]
    require_size("gated_backward", (n, width), dy=dy)
    require_rows("gated_backward", dy=dy, pair=pair, seed=seed)
    require_dtype("gated_backward", dy=dy, pair=pair)
    drop = dropout("gated_backward", p, seed)
    dpair = torch.empty_like(pair)
    if dy.numel():
        with torch.cuda.device_of(dy):
            _gated_backward_kernel[_grid(n, width)](
                dy, pair, dpair, drop.seed, n, drop.threshold, drop.scale, width, **_tile(act)
            )
    return dpair


def _width(op: str, pair: Tensor) -> int:
    if pair.dim() != 2 or pair.shape[1] % 2:
        raise ShapeError(
            f"{op}: rows {tuple(pair.shape)}: expected (n, 2 * width), what is activated and then "
            "its gate. Flatten with view(), and check which layer they come from."
        )
    return pair.shape[1] // 2


def _grid(n: int, width: int) -> tuple[int, int]:
    return triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS)


def _tile(act: str) -> dict[str, object]:
    return {"ACT": act, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}
