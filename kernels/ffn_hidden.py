"""The wide middle of a feed-forward block in registers: ``u = a2 · gelu(a1 · z + bias1)``.

With expand = a1 ⊗ b1 and contract = a2 ⊗ b2 the hidden row is (h_out, c) = a1 (h_out, h_in) · z
(h_in, c), where z = x · b1ᵀ. So the hidden layer, 3,072 numbers wide in BERT-base, is made again
from z (384 of them for a1 16x2) wherever it is needed, and never leaves the registers.

Layouts: z (n, h_in, rank1, c), u (n, o_out, rank2, c); a slot is one (h_in, rank1) or
(o_out, rank2) pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import activate, activate_grad, require_activation

PROGRAMS = 264
"""Most programs per block of columns of a backward launch: each leaves one row of fp32 sums."""

SUMS = 80
"""fp32 sums per thread of a backward program, one register each: h_out * (slots + 1) for a1 16x2,
a2 2x16. Wider hidden layers are shared out over programs."""


class HiddenGradients(NamedTuple):
    """dz as z, and u once more; da1 as a1, da2 as a2, dbias1 (h_out * c) or None."""

    dz: Tensor
    u: Tensor
    da1: Tensor
    da2: Tensor
    dbias1: Tensor | None


@triton.jit
def hidden_slice(
    zs,
    a1,
    bias1,
    i,
    cols,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    RANK1: tl.constexpr,
    C: tl.constexpr,
):
    """Slice i of the hidden row before its activation, shaped as the fp32 tiles ``zs``."""
    hidden = tl.zeros(zs[0].shape, tl.float32)
    for j in tl.static_range(H_IN):
        for r in tl.static_range(RANK1):
            entry = tl.load(a1 + (r * H_OUT + i) * H_IN + j).to(tl.float32)
            hidden += entry * zs[j * RANK1 + r]
    if bias1 is not None:
        added = tl.load(bias1 + i * C + cols, mask=cols < C, other=0).to(tl.float32)
        if len(zs[0].shape) == 2:
            hidden += added[None, :]
        else:
            hidden += added
    return hidden


@triton.jit
def mixed_hidden(
    zs,
    a1,
    bias1,
    a2,
    cols,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    RANK1: tl.constexpr,
    C: tl.constexpr,
    O_OUT: tl.constexpr,
    RANK2: tl.constexpr,
    ACT: tl.constexpr,
):
    """u's slots at columns ``cols`` of z's slots ``zs``: a tuple of fp32 tiles."""
    us = ()
    for _ in tl.static_range(O_OUT * RANK2):
        us += (tl.zeros(zs[0].shape, tl.float32),)
    for i in range(H_OUT):
        active = activate(hidden_slice(zs, a1, bias1, i, cols, H_OUT, H_IN, RANK1, C), ACT)
        added = ()
        for o in tl.static_range(O_OUT):
            for r in tl.static_range(RANK2):
                entry = tl.load(a2 + (r * O_OUT + o) * H_OUT + i).to(tl.float32)
                added += (us[o * RANK2 + r] + entry * active,)
        us = added
    return us


@triton.jit
def _hidden_kernel(
    z,
    a1,
    bias1,
    a2,
    u,
    n,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    RANK1: tl.constexpr,
    C: tl.constexpr,
    O_OUT: tl.constexpr,
    RANK2: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < n)[:, None] & (cols < C)[None, :]
    from_row = rows.to(tl.int64)[:, None] * (H_IN * RANK1 * C) + cols[None, :]
    zs = ()
    for s in tl.static_range(H_IN * RANK1):
        zs += (tl.load(z + from_row + s * C, mask=mask, other=0).to(tl.float32),)
    us = mixed_hidden(zs, a1, bias1, a2, cols, H_OUT, H_IN, RANK1, C, O_OUT, RANK2, ACT)
    to_row = rows.to(tl.int64)[:, None] * (O_OUT * RANK2 * C) + cols[None, :]
    for s in tl.static_range(O_OUT * RANK2):
        tl.store(u + to_row + s * C, us[s].to(u.dtype.element_ty), mask=mask)


@triton.jit
def _hidden_backward_kernel(
    z,
    du,
    a1,
    bias1,
    a2,
    dz,
    u,
    sums1,
    sums2,
    sums_bias,
    n,
    steps,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    RANK1: tl.constexpr,
    C: tl.constexpr,
    O_OUT: tl.constexpr,
    RANK2: tl.constexpr,
    ACT: tl.constexpr,
    SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A thread keeps a column and walks down the rows: sums over rows are its own registers, with
    no exchange until the last row.

    Program (p, b, g): rows p, p + programs, ..., columns of block b, hidden slices g * SLICES and
    on. sums1 (programs, blocks, h_out, slots1), sums2 (programs, blocks, h_out, slots2) and
    sums_bias (programs, h_out, c), or None; dz and u (None with sums) need all slices together."""
    IN: tl.constexpr = H_IN * RANK1
    OUT: tl.constexpr = O_OUT * RANK2
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i0 = tl.program_id(2) * SLICES
    totals1 = ()
    totals2 = ()
    totals_bias = ()
    if sums1 is not None:
        for _ in tl.static_range(SLICES * IN):
            totals1 += (tl.zeros((COLUMNS,), tl.float32),)
        for _ in tl.static_range(SLICES * OUT):
            totals2 += (tl.zeros((COLUMNS,), tl.float32),)
        if sums_bias is not None:
            for _ in tl.static_range(SLICES):
                totals_bias += (tl.zeros((COLUMNS,), tl.float32),)
    first = tl.program_id(0).to(tl.int64)
    for step in range(steps):
        row = step * tl.num_programs(0) + first
        mask = cols < tl.where(row < n, C, 0)
        zs = ()
        dzs = ()
        for s in tl.static_range(IN):
            value = tl.load(z + (row * IN + s) * C + cols, mask=mask, other=0)
            zs += (value.to(tl.float32),)
            dzs += (tl.zeros((COLUMNS,), tl.float32),)
        dus = ()
        us = ()
        for s in tl.static_range(OUT):
            value = tl.load(du + (row * OUT + s) * C + cols, mask=mask, other=0)
            dus += (value.to(tl.float32),)
            us += (tl.zeros((COLUMNS,), tl.float32),)
        more1 = ()
        more2 = ()
        more_bias = ()
        for i in tl.static_range(SLICES):
            hidden = hidden_slice(zs, a1, bias1, i0 + i, cols, H_OUT, H_IN, RANK1, C)
            active = activate(hidden, ACT)
            pull = tl.zeros((COLUMNS,), tl.float32)
            added = ()
            for s in tl.static_range(OUT):
                at = a2 + (s % RANK2 * O_OUT + s // RANK2) * H_OUT + i0 + i
                entry = tl.load(at).to(tl.float32)
                pull += entry * dus[s]
                added += (us[s] + entry * active,)
                if sums1 is not None:
                    more2 += (totals2[i * OUT + s] + dus[s] * active,)
            us = added
            pull *= activate_grad(hidden, ACT)
            added = ()
            for s in tl.static_range(IN):
                at = a1 + (s % RANK1 * H_OUT + i0 + i) * H_IN + s // RANK1
                entry = tl.load(at).to(tl.float32)
                added += (dzs[s] + entry * pull,)
                if sums1 is not None:
                    more1 += (totals1[i * IN + s] + zs[s] * pull,)
            dzs = added
            if sums_bias is not None:
                more_bias += (totals_bias[i] + pull,)
        totals1 = more1
        totals2 = more2
        totals_bias = more_bias
        if dz is not None:
            for s in tl.static_range(IN):
                at = dz + (row * IN + s) * C + cols
                tl.store(at, dzs[s].to(dz.dtype.element_ty), mask=mask)
            for s in tl.static_range(OUT):
                at = u + (row * OUT + s) * C + cols
                tl.store(at, us[s].to(u.dtype.element_ty), mask=mask)
    if sums1 is not None:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for i in tl.static_range(SLICES):
            for s in tl.static_range(IN):
                at = sums1 + (program * H_OUT + i0 + i) * IN + s
                tl.store(at, tl.sum(totals1[i * IN + s], 0))
            for s in tl.static_range(OUT):
                at = sums2 + (program * H_OUT + i0 + i) * OUT + s
                tl.store(at, tl.sum(totals2[i * OUT + s], 0))
            if sums_bias is not None:
                at = sums_bias + (tl.program_id(0) * H_OUT + i0 + i) * C + cols
                tl.store(at, totals_bias[i], mask=cols < C)


def columns(c: int) -> int:
    """Columns per program: 128, 64 or 32 where they divide c, else masked blocks of up to 128."""
    fitting = [size for size in (128, 64, 32) if c % size == 0]
    return fitting[0] if fitting else min(128, max(32, triton.next_power_of_2(c)))


def slices(h_out: int, held: int) -> int:
    """Hidden slices whose sums, ``held`` each, one backward program keeps in registers."""
    return max(s for s in range(1, h_out + 1) if h_out % s == 0 and (s == 1 or s * held <= SUMS))


def hidden_mix(
    z: Tensor, a1: Tensor, bias1: Tensor | None, a2: Tensor, activation: str = "gelu"
) -> Tensor:
    """u (n, o_out, rank2, c) of z (n, h_in, rank1, c); a1 (rank1, h_out, h_in), a2 (rank2, o_out,
    h_out), bias1 (h_out * c). Contiguous, one device, no checks: `kronbert.kernels.ffn` makes
    them."""
    n, h_in, rank1, c = z.shape
    rank2, o_out, h_out = a2.shape
    u = z.new_empty(n, o_out, rank2, c)
    if n == 0:
        return u
    block = columns(c)
    # 1,024 numbers, 8 per thread and slot, chosen by registers at compile time, not timed.
    rows = 1024 // block
    with torch.cuda.device_of(z):
        _hidden_kernel[(triton.cdiv(n, rows), triton.cdiv(c, block))](
            z,
            a1,
            bias1,
            a2,
            u,
            n,
            H_OUT=h_out,
            H_IN=h_in,
            RANK1=rank1,
            C=c,
            O_OUT=o_out,
            RANK2=rank2,
            ACT=require_activation("hidden_mix", activation),
            ROWS=rows,
            COLUMNS=block,
            num_warps=4,
        )
    return u


def hidden_mix_backward(
    z: Tensor,
    du: Tensor,
    a1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    activation: str = "gelu",
) -> HiddenGradients:
    """Gradients of `hidden_mix` from z and du, shaped as u; the hidden layer is made again.

    Sums over rows are fp32, in two stages, in an order that depends on the sizes alone."""
    n, h_in, rank1, c = z.shape
    rank2, o_out, h_out = a2.shape
    dz, u = torch.empty_like(z), torch.empty_like(du)
    block = columns(c)
    blocks = triton.cdiv(c, block)
    together = slices(h_out, h_in * rank1 + o_out * rank2 + 1)
    programs = min(PROGRAMS, n)
    sums1 = z.new_empty(programs, blocks, h_out, h_in, rank1, dtype=torch.float32)
    sums2 = z.new_empty(programs, blocks, h_out, o_out, rank2, dtype=torch.float32)
    sums_bias = z.new_empty(programs, h_out * c, dtype=torch.float32) if bias1 is not None else None

    def launch(each: int, rows: tuple[Tensor | None, ...], sums: tuple[Tensor | None, ...]) -> None:
        with torch.cuda.device_of(z):
            _hidden_backward_kernel[(programs, blocks, h_out // each)](
                z,
                du,
                a1,
                bias1,
                a2,
                *rows,
                *sums,
                n,
                triton.cdiv(n, programs),
                H_OUT=h_out,
                H_IN=h_in,
                RANK1=rank1,
                C=c,
                O_OUT=o_out,
                RANK2=rank2,
                ACT=require_activation("hidden_mix_backward", activation),
                SLICES=each,
                COLUMNS=block,
                num_warps=max(1, block // 32),
            )

    if n > 0 and together == h_out:
        launch(h_out, (dz, u), (sums1, sums2, sums_bias))
    elif n > 0:
        launch(h_out, (dz, u), (None, None, None))
        launch(together, (None, None), (sums1, sums2, sums_bias))
    return HiddenGradients(
        dz,
        u,
        sums1.sum((0, 1)).permute(2, 0, 1).to(a1.dtype).contiguous(),
        sums2.sum((0, 1)).permute(2, 1, 0).to(a2.dtype).contiguous(),
        None if sums_bias is None or bias1 is None else sums_bias.sum(0).to(bias1.dtype),
    )
