"""LayerNorm of a residual sum with dropout, ``LN(residual + dropout(x + shift))``; its backward.

Backward reads the sum ``total = residual + dropout(x + shift)`` that forward stored in the rows'
dtype. It takes the place of x, which nothing else needs, so storing it costs no memory over
recomputing it from x and residual; backward then reads one tensor and not two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_tile import (
    Normed,
    check_norm,
    columns,
    dropout,
    kept,
    new_normed,
    norm_tile,
    require_dtype,
    require_rows,
    require_size,
)

PROGRAMS = 528
"""Most programs of a backward launch: each leaves one fp32 row of weight and bias gradients."""


class Tile(NamedTuple):
    """A program's rows and how their columns lie in registers: parts blocks of a power of two."""

    rows: int
    block: int
    parts: int
    warps: int


class NormGradients(NamedTuple):
    """dx and the residual's dtotal (n, width), one tensor where nothing was dropped; dweight, dbias
    and dshift (width). None where not asked for."""

    dx: Tensor
    dtotal: Tensor | None
    dweight: Tensor
    dbias: Tensor | None
    dshift: Tensor | None


@triton.jit
def _norm_kernel(
    x,
    shift,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    seed,
    n,
    threshold,
    scale,
    eps,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = rows.to(tl.int64)[:, None] * width
    parts = ()
    for c in tl.static_range(PARTS):
        cols = (c * BLOCK + tl.arange(0, BLOCK))[None, :]
        mask = (rows < n)[:, None] & (cols < width)
        parts += (tl.load(x + base + cols, mask=mask, other=0).to(tl.float32),)
    norm_tile(
        parts,
        rows,
        n,
        shift,
        residual,
        weight,
        bias,
        y,
        total,
        mean,
        rstd,
        seed,
        threshold,
        scale,
        eps,
        width,
        PARTS,
        BLOCK,
    )


@triton.jit
def _norm_backward_kernel(
    dy,
    added,
    total,
    mean,
    rstd,
    weight,
    dtotal,
    dx,
    sums,
    seed,
    n,
    steps,
    threshold,
    scale,
    width: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Column sums stay in registers, one tile per part, until the program's last row.
    dweights = ()
    dbiases = ()
    dshifts = ()
    for _ in tl.static_range(PARTS):
        dweights += (tl.zeros((ROWS, BLOCK), tl.float32),)
        dbiases += (tl.zeros((ROWS, BLOCK), tl.float32),)
        if SHIFT:
            dshifts += (tl.zeros((ROWS, BLOCK), tl.float32),)
    for step in range(steps):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        rows = tile * ROWS + tl.arange(0, ROWS)
        base = rows.to(tl.int64)[:, None] * width
        middle = tl.load(mean + rows, mask=rows < n, other=0)[:, None]
        inverse = tl.load(rstd + rows, mask=rows < n, other=0)[:, None]
        along = tl.zeros((ROWS,), tl.float32)
        plain = tl.zeros((ROWS,), tl.float32)
        hats = ()
        pulls = ()
        added_weights = ()
        added_biases = ()
        for c in tl.static_range(PARTS):
            cols = c * BLOCK + tl.arange(0, BLOCK)
            mask = (rows < n)[:, None] & (cols < width)[None, :]
            grad = tl.load(dy + base + cols[None, :], mask=mask, other=0).to(tl.float32)
            value = tl.load(total + base + cols[None, :], mask=mask, other=0).to(tl.float32)
            hat = tl.where(mask, (value - middle) * inverse, 0.0)
            pull = grad * tl.load(weight + cols, mask=cols < width, other=0).to(tl.float32)[None, :]
            along += tl.sum(pull * hat, 1)
            plain += tl.sum(pull, 1)
            hats += (hat,)
            pulls += (pull,)
            added_weights += (dweights[c] + grad * hat,)
            added_biases += (dbiases[c] + grad,)
        dweights = added_weights
        dbiases = added_biases
        added_shifts = ()
        for c in tl.static_range(PARTS):
            cols = c * BLOCK + tl.arange(0, BLOCK)
            mask = (rows < n)[:, None] & (cols < width)[None, :]
            pull = pulls[c] - plain[:, None] / width - hats[c] * (along[:, None] / width)
            pull = tl.where(mask, pull * inverse, 0.0)
            if added is not None:
                at = added + base + cols[None, :]
                pull += tl.load(at, mask=mask, other=0).to(tl.float32)
            if dtotal is not None:
                at = dtotal + base + cols[None, :]
                tl.store(at, pull.to(dy.dtype.element_ty), mask=mask)
            if scale is not None:
                bits = kept(seed, rows, width, c * BLOCK, BLOCK)
                pull = tl.where(bits >= threshold, pull * scale, 0.0)
                at = dx + base + cols[None, :]
                tl.store(at, pull.to(dy.dtype.element_ty), mask=mask)
            if SHIFT:
                added_shifts += (dshifts[c] + pull,)
        dshifts = added_shifts
    for c in tl.static_range(PARTS):
        cols = c * BLOCK + tl.arange(0, BLOCK)
        row = sums + tl.program_id(0) * ((3 if SHIFT else 2) * width) + cols
        tl.store(row, tl.sum(dweights[c], 0), mask=cols < width)
        tl.store(row + width, tl.sum(dbiases[c], 0), mask=cols < width)
        if SHIFT:
            tl.store(row + 2 * width, tl.sum(dshifts[c], 0), mask=cols < width)


def tile(width: int, *, backward: bool = False) -> Tile:
    """Chosen by registers at compile time, not timed: at most 64 columns of a row in a thread's
    registers, 24 in backward, which holds up to five arrays of them."""
    block, parts = columns(width)
    held = block * parts
    warps = 8 if held > 2048 else 4
    rows = max(1, (2048 if backward else 4096) // held)
    return Tile(min(4, rows), block, parts, warps)


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    shift: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
    total: bool = False,
) -> Normed:
    """``LN(residual + dropout(x + shift)) * weight + bias`` over rows: x, residual (n, width).

    weight, bias, shift (width); shift is the bias of the linear map that x left out. p: dropout's
    probability, seed: int64 of one element on x's device. keep: store what backward reads, but for
    a total that would be x. total: store the sum though nothing is kept. Defined by
    `torch.nn.functional.layer_norm`. Raises `ShapeError` for rows wider than 4,096."""
    check_norm("residual_norm", x, residual, weight, bias)
    n, width = x.shape
    require_size("residual_norm", (width,), shift=shift)
    require_rows("residual_norm", x=x, shift=shift, seed=seed)
    drop = dropout("residual_norm", p, seed)
    out = new_normed(x, width, keep)
    if residual is None and shift is None and p == 0:
        out = out._replace(total=None)
    elif total and not keep:
        out = out._replace(total=torch.empty_like(out.y))
    if n == 0:
        return out
    size = tile(width)
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(n, size.rows),)](
            x,
            shift,
            residual,
            weight,
            bias,
            *out,
            drop.seed,
            n,
            drop.threshold,
            drop.scale,
            eps,
            width,
            ROWS=size.rows,
            PARTS=size.parts,
            BLOCK=size.block,
            num_warps=size.warps,
        )
    return out


def residual_norm_backward(
    dy: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    added: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    has_bias: bool = True,
    has_shift: bool = False,
    has_residual: bool = True,
) -> NormGradients:
    """Gradients of `residual_norm` from what it kept; dy, total (n, width), mean, rstd (n,).

    added (n, width): the gradient of the sum itself, where forward gave it out. The same p and seed
    drop the same places. Column sums are added up in fp32 in two stages, in an
    order that depends on n and width alone. has_*: whether forward was given it."""
    require_rows(
        "residual_norm_backward",
        dy=dy,
        added=added,
        total=total,
        mean=mean,
        rstd=rstd,
        weight=weight,
        seed=seed,
    )
    n, width = dy.shape
    require_size("residual_norm_backward", (n, width), added=added, total=total)
    require_size("residual_norm_backward", (width,), weight=weight)
    require_dtype("residual_norm_backward", dy=dy, added=added, total=total)
    drop = dropout("residual_norm_backward", p, seed)
    dx = torch.empty_like(dy)
    dtotal = torch.empty_like(dy) if has_residual and p > 0 else None
    size = tile(width, backward=True)
    programs = min(PROGRAMS, triton.cdiv(n, size.rows))
    sums = dy.new_empty(programs, 3 if has_shift else 2, width, dtype=torch.float32)
    if n > 0:
        with torch.cuda.device_of(dy):
            _norm_backward_kernel[(programs,)](
                dy,
                added,
                total,
                mean,
                rstd,
                weight,
                dtotal if p > 0 else dx,
                dx,
                sums,
                drop.seed,
                n,
                triton.cdiv(n, size.rows * programs),
                drop.threshold,
                drop.scale,
                width,
                SHIFT=has_shift,
                ROWS=size.rows,
                PARTS=size.parts,
                BLOCK=size.block,
                num_warps=size.warps,
            )
    first, second, *third = (row.sum(0).to(weight.dtype) for row in sums.unbind(1))
    return NormGradients(
        dx,
        dx if has_residual and p == 0 else dtotal,
        first,
        second if has_bias else None,
        third[0] if has_shift else None,
    )
