"""The end of a fused layer on rows in registers: ``LN(residual + dropout(part + shift))``.

`norm_tile` is that arithmetic as a device function; every kernel whose program holds whole rows
ends with it. Beside it: what its launchers share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KronbertError, ShapeError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

WIDEST = 4096
"""Columns of the widest row a program holds in registers."""


class Dropout(NamedTuple):
    """What a kernel takes for a probability: keep where 24 random bits >= threshold, times scale.

    scale None leaves dropout out of the kernel at compile time."""

    seed: Tensor | None
    threshold: int
    scale: float | None


class Normed(NamedTuple):
    """y (n, width); total (n, width), mean (n,) and rstd (n,) in fp32, or None if not kept."""

    y: Tensor
    total: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


def dropout(op: str, p: float, seed: Tensor | None) -> Dropout:
    """The kernel's arguments for probability ``p`` and the one-element int64 tensor ``seed``."""
    if not 0 <= p <= 1:
        raise KronbertError(f"{op}: p={p!r}: expected a probability, 0 to 1.")
    if p == 0:
        return Dropout(None, 0, None)
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        raise KronbertError(
            f"{op}: p={p} needs seed, an int64 tensor of one element on the input's device: "
            "torch.randint(2**62, (1,), device=x.device)."
        )
    return Dropout(seed, round(p * 2**24), 0.0 if p == 1 else 1 / (1 - p))


def require_rows(op: str, **tensors: Tensor | None) -> None:
    """Raise `ShapeError` unless each tensor given is contiguous and on the first one's device."""
    first = next(t for t in tensors.values() if t is not None)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{op}: {name} {tuple(tensor.shape)} is not contiguous: pass {name}.contiguous()."
            )
        if tensor.device != first.device:
            raise ShapeError(
                f"{op}: {name} is on {tensor.device}, expected {first.device}. Move one of them."
            )


def require_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise `ShapeError` unless all tensors given are of one dtype that kernels take."""
    dtype = next(t.dtype for t in tensors.values() if t is not None)
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != dtype or dtype not in DTYPES):
            raise ShapeError(
                f"{op}: {name} is {tensor.dtype}: expected {next(iter(tensors))}'s {dtype}, and one"
                " of float32, float16, bfloat16. Cast it, or use kronbert.blocks without kernels."
            )


def require_size(op: str, size: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise `ShapeError` unless each tensor given has ``size``."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != size:
            raise ShapeError(
                f"{op}: {name} {tuple(tensor.shape)}: expected {size}. Check which layer it comes "
                "from."
            )


@triton.jit
def kept(seed, rows, width, first, BLOCK: tl.constexpr):
    """24 random bits for each of rows (m,) and columns ``first`` and on: (m, BLOCK) of int32.

    One Philox call gives four neighbouring columns, so first and BLOCK are multiples of 4. The
    bits depend on seed, row and column alone: every kernel and tile size meets the same mask."""
    quads = first // 4 + tl.arange(0, BLOCK // 4)
    at = rows.to(tl.int64)[:, None] * ((width + 3) // 4) + quads[None, :]
    low = (at & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seed), low, (at >> 32).to(tl.uint32), zero, zero)
    bits = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    return (tl.reshape(bits, (rows.shape[0], BLOCK)) >> 8).to(tl.int32)


@triton.jit
def norm_tile(
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
    width: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finish rows (m,) whose columns are the fp32 tuple ``parts``, PARTS times (m, BLOCK).

    Pointers that are None (shift, residual, bias, total, mean, rstd) leave their term out, scale
    None leaves dropout out."""
    live = (rows < n)[:, None]
    base = rows.to(tl.int64)[:, None] * width
    sums = ()
    moment = tl.zeros((rows.shape[0],), tl.float32)
    for c in tl.static_range(PARTS):
        cols = c * BLOCK + tl.arange(0, BLOCK)
        inside = cols < width
        part = parts[c]
        if shift is not None:
            part += tl.load(shift + cols, mask=inside, other=0).to(tl.float32)[None, :]
        if scale is not None:
            bits = kept(seed, rows, width, c * BLOCK, BLOCK)
            part = tl.where(bits >= threshold, part * scale, 0.0)
        mask = live & inside[None, :]
        if residual is not None:
            part += tl.load(residual + base + cols[None, :], mask=mask, other=0).to(tl.float32)
        # Rounded as backward will read it, kept or not: training and evaluation agree to the bit.
        rounded = part.to(y.dtype.element_ty)
        if total is not None:
            tl.store(total + base + cols[None, :], rounded, mask=mask)
        part = tl.where(mask, rounded.to(tl.float32), 0.0)
        moment += tl.sum(part, 1)
        sums += (part,)
    middle = moment / width
    moment = tl.zeros((rows.shape[0],), tl.float32)
    for c in tl.static_range(PARTS):
        away = sums[c] - middle[:, None]
        if PARTS * BLOCK != width:
            away = tl.where((c * BLOCK + tl.arange(0, BLOCK) < width)[None, :], away, 0.0)
        moment += tl.sum(away * away, 1)
    inverse = 1 / tl.sqrt(moment / width + eps)
    if mean is not None:
        tl.store(mean + rows, middle, mask=rows < n)
        tl.store(rstd + rows, inverse, mask=rows < n)
    for c in tl.static_range(PARTS):
        cols = c * BLOCK + tl.arange(0, BLOCK)
        inside = cols < width
        part = (sums[c] - middle[:, None]) * inverse[:, None]
        part *= tl.load(weight + cols, mask=inside, other=0).to(tl.float32)[None, :]
        if bias is not None:
            part += tl.load(bias + cols, mask=inside, other=0).to(tl.float32)[None, :]
        mask = live & inside[None, :]
        tl.store(y + base + cols[None, :], part.to(y.dtype.element_ty), mask=mask)


def columns(width: int) -> tuple[int, int]:
    """(block, parts): 768 is 3 blocks of 256; a width with no such form is one padded block."""
    block = width & -width
    parts = width // block
    if parts <= 8 and block >= 16:
        return block, parts
    return max(16, triton.next_power_of_2(width)), 1


def check_norm(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> None:
    """`ShapeError` unless x (n, in), residual (n, width), weight and bias (width) go together."""
    if x.dim() != 2:
        raise ShapeError(f"{op}: rows {tuple(x.shape)}: expected (n, width). Flatten with view().")
    width = weight.numel()
    if residual is None:
        require_size(op, (x.shape[0], width), x=x)
    require_size(op, (x.shape[0], width), residual=residual)
    require_size(op, (width,), weight=weight, bias=bias)
    require_rows(op, x=x, residual=residual, weight=weight, bias=bias)
    require_dtype(op, x=x, residual=residual)
    if not 1 <= width <= WIDEST:
        raise ShapeError(
            f"{op}: width {width}: one program holds rows of 1 to {WIDEST}. "
            "Use torch.nn.functional.layer_norm for wider ones."
        )


def new_normed(x: Tensor, width: int, keep: bool) -> Normed:
    """Uninitialised outputs for x (n, ...) and rows of ``width``."""
    n = x.shape[0]
    y = x.new_empty(n, width)
    if not keep:
        return Normed(y, None, None, None)
    mean = x.new_empty(n, dtype=torch.float32)
    return Normed(y, torch.empty_like(y), mean, torch.empty_like(mean))
