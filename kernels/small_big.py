"""``a ⊗ b`` with one small and one big matrix: the big one on tensor cores, the small one mixes.

The papers' shapes: a 16x2 ⊗ b 192x384 (a small, slices of x are contiguous) and a 384x48 ⊗ b 2x16
(b small, slices are interleaved). Element (s, g) of x, s along the small and g along the big
matrix, lies at s * XS + g * XG, so that one kernel serves both. Big first keeps big · slice in
registers and mixes it into every output slice; small first mixes slices of x and multiplies the
mixture by the big matrix. Either way nothing in between is stored.
"""

# ruff: noqa: RUF005  -- Triton's tuples grow by +, they have no unpacking

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shapes import KroneckerShape
from .epilogue import Ending, deinterleave, finish, interleave, pick, three

LARGEST_SIDE = 32
"""Of the small matrix. With `LARGEST_SMALL` it bounds the unrolled mixing, rank * s_out * s_in
multiply-adds per element of a slice."""

LARGEST_SMALL = 64
"""Entries of the small matrix."""

LIVE_TILES = 8
"""fp32 tiles kept for one product: rank * s_in (big first) or s_out (small first)."""


class Sides(NamedTuple):
    """A shape seen from its small matrix: (s_out, s_in) small, (g_out, g_in) big."""

    small_is_b: bool
    s_out: int
    s_in: int
    g_out: int
    g_in: int
    big_first: bool


def sides(shape: KroneckerShape) -> Sides | None:
    """How this family runs ``shape``, or None when both its matrices are too large for it."""
    a = (shape.a_out, shape.a_in)
    b = (shape.b_out, shape.b_in)
    small_is_b = b[0] * b[1] <= a[0] * a[1]
    small, big = (b, a) if small_is_b else (a, b)
    first = shape.order == ("a" if small_is_b else "b")  # whether big meets x first
    if max(small) > LARGEST_SIDE or small[0] * small[1] > LARGEST_SMALL:
        return None
    if (small[1] if first else small[0]) > LIVE_TILES:
        return None
    return Sides(small_is_b, *small, *big, first)


def rank_limit(side: Sides) -> int:
    """Terms one launch can sum; more are summed over several launches."""
    return max(1, LIVE_TILES // side.s_in) if side.big_first else LIVE_TILES


class Tiles(NamedTuple):
    """Rows, columns of a chunk, chunks per program, depth per step; launch options."""

    rows: int
    columns: int
    chunks: int
    depth: int
    warps: int
    stages: int


def tiles(side: Sides, rank: int, dtype: torch.dtype) -> Tiles:
    """Block sizes and launch options, from the registers the accumulators take.

    Chosen so that nothing spills when compiled for sm_80, sm_90 and sm_100, not by timing."""
    half = dtype != torch.float32
    rows = 64 if half else 32
    warps = 8
    live = rank * side.s_in + 1 if side.big_first else side.s_out
    if side.big_first and side.small_is_b:
        live += side.s_out  # the output slices wait for each other to be interleaved
    each = (96 if half else 64) if side.big_first else (64 if half else 32)
    budget = each * 32 * warps  # fp32 numbers of all accumulators together
    widest = (128 if half else 64) if side.big_first else (64 if half else 32)
    columns = block(side.g_out, widest)
    while columns > 16 and live * rows * columns > budget:
        columns //= 2
    while rows > 16 and live * rows * columns > budget:
        rows //= 2
    if side.big_first:
        return Tiles(rows, columns, 1, block(side.g_in, 64 if half else 32), warps, 2)
    depth = block(side.g_in, 64 if half else 16)
    stages = 1  # slices of x go to registers, not through s_in buffers of shared memory
    if side.small_is_b:
        # A (rows, depth, s_in) tile of x waits in registers.
        while depth > 16 and rows * depth * side.s_in > 16 * 32 * warps:
            depth //= 2
        # and the next ones in shared memory: two of 64 KiB would not fit a GeForce's 99.
        fits = rows * depth * triton.next_power_of_2(side.s_in) * 2 <= 32 * 1024
        stages = (3 if fits else 2) if half else 1
        if rank > 1 or side.s_out * side.s_in < 32:
            budget //= 2  # a cheap mixture may as well be made again
    # The columns of one program share the mixture.
    whole = triton.cdiv(side.g_out, columns)
    most = budget // (live * rows * columns)
    chunks = max(c for c in range(1, whole + 1) if whole % c == 0 and c <= max(1, most))
    return Tiles(rows, columns, chunks, depth, warps, stages)


def block(size: int, largest: int) -> int:
    """The largest power of two, 16 to ``largest``, that divides size; for an odd size, the one
    that leaves the fewest masked lanes."""
    candidates = [c for c in (128, 64, 32, 16) if c <= largest]
    for candidate in candidates:
        if size % candidate == 0:
            return candidate
    return min(candidates, key=lambda c: (triton.cdiv(size, c) * c, -c))


@triton.jit
def _big_first(
    x_ptr,
    s_ptr,
    g_ptr,
    bias_ptr,
    partial_ptr,
    dy_ptr,
    y_ptr,
    n,
    tile,
    column,
    RANK: tl.constexpr,
    S_OUT: tl.constexpr,
    S_IN: tl.constexpr,
    G_OUT: tl.constexpr,
    G_IN: tl.constexpr,
    SMALL_IS_B: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
):
    """z[r, j] = g[r] · x_j for every r and j, then y_i = sum s[r, i, j] z[r, j]; CHUNKS is 1."""
    IN: tl.constexpr = S_IN * G_IN
    OUT: tl.constexpr = S_OUT * G_OUT
    SPLIT: tl.constexpr = SMALL_IS_B and (S_IN == 1 or S_IN == 2 or S_IN == 4 or S_IN == 8)
    JOIN: tl.constexpr = SMALL_IS_B and (S_OUT == 1 or S_OUT == 2 or S_OUT == 4 or S_OUT == 8)
    XS: tl.constexpr = 1 if SMALL_IS_B else G_IN
    XG: tl.constexpr = S_IN if SMALL_IS_B else 1
    YS: tl.constexpr = 1 if SMALL_IS_B else G_OUT
    YG: tl.constexpr = S_OUT if SMALL_IS_B else 1
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    live = rows < n
    g = column * BG + tl.arange(0, BG)
    zs = ()
    for _ in tl.static_range(RANK * S_IN):
        zs = zs + (tl.zeros((BM, BG), tl.float32),)
    for k0 in range(0, G_IN, BK):
        k = k0 + tl.arange(0, BK)
        if SPLIT:
            flat = k0 * S_IN + tl.arange(0, BK * S_IN)[None, :]
            xs = deinterleave(
                tl.load(x_ptr + rows * IN + flat, mask=live & (flat < IN), other=0.0), S_IN
            )
        else:
            xs = ()
            for j in tl.static_range(S_IN):
                at = rows * IN + j * XS + k[None, :] * XG
                mask = live & (k < G_IN)[None, :]
                xs = xs + (tl.load(x_ptr + at, mask=mask, other=0.0),)
        new = ()
        for r in tl.static_range(RANK):
            at = r * G_OUT * G_IN + g[None, :] * G_IN + k[:, None]
            mask = (g < G_OUT)[None, :] & (k < G_IN)[:, None]
            big = tl.load(g_ptr + at, mask=mask, other=0.0)
            for j in tl.static_range(S_IN):
                z = tl.dot(xs[j], big, zs[r * S_IN + j], input_precision="ieee")
                new = new + (z,)
        zs = new
    ys = ()
    for i in tl.static_range(S_OUT):
        y = tl.zeros((BM, BG), tl.float32)
        for r in tl.static_range(RANK):
            for j in tl.static_range(S_IN):
                weight = tl.load(s_ptr + (r * S_OUT + i) * S_IN + j).to(tl.float32)
                y += weight * zs[r * S_IN + j]
        if JOIN:
            ys = ys + (y,)
        else:
            at = i * YS + g[None, :] * YG
            mask = live & (g < G_OUT)[None, :]
            finish(
                y, rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD, ACT
            )
    if JOIN:
        at = column * BG * S_OUT + tl.arange(0, BG * S_OUT)[None, :]
        y = interleave(ys, S_OUT)
        mask = live & (at < OUT)
        finish(y, rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD, ACT)


@triton.jit
def _small_first(
    x_ptr,
    s_ptr,
    g_ptr,
    bias_ptr,
    partial_ptr,
    dy_ptr,
    y_ptr,
    n,
    tile,
    column,
    RANK: tl.constexpr,
    S_OUT: tl.constexpr,
    S_IN: tl.constexpr,
    G_OUT: tl.constexpr,
    G_IN: tl.constexpr,
    SMALL_IS_B: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
):
    """u_i = sum_j s[r, i, j] x_j, then y_i = sum_r g[r] · u_i; CHUNKS * BG columns per program."""
    IN: tl.constexpr = S_IN * G_IN
    OUT: tl.constexpr = S_OUT * G_OUT
    JOIN: tl.constexpr = SMALL_IS_B and (S_OUT == 1 or S_OUT == 2 or S_OUT == 4 or S_OUT == 8)
    BS: tl.constexpr = triton.next_power_of_2(S_IN)
    YS: tl.constexpr = 1 if SMALL_IS_B else G_OUT
    YG: tl.constexpr = S_OUT if SMALL_IS_B else 1
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    live = rows < n
    first = column * CHUNKS * BG
    dtype = x_ptr.dtype.element_ty
    ys = ()
    for _ in tl.static_range(CHUNKS * S_OUT):
        ys = ys + (tl.zeros((BM, BG), tl.float32),)
    for k0 in range(0, G_IN, BK):
        k = k0 + tl.arange(0, BK)
        for r in range(RANK):  # not unrolled: four terms at once would not fit in registers
            us = ()
            if SMALL_IS_B:
                j = tl.arange(0, BS)
                at = k[None, :, None] * S_IN + j[None, None, :]
                mask = (k < G_IN)[None, :, None] & (j < S_IN)[None, None, :] & live[:, :, None]
                x = tl.load(x_ptr + rows[:, :, None] * IN + at, mask=mask, other=0.0).to(tl.float32)
                for i in tl.static_range(S_OUT):
                    s_at = s_ptr + (r * S_OUT + i) * S_IN + j
                    weight = tl.load(s_at, mask=j < S_IN, other=0.0).to(tl.float32)
                    u = tl.sum(x * weight[None, None, :], axis=2)
                    us = us + (u.to(dtype),)
            else:
                for _ in tl.static_range(S_OUT):
                    us = us + (tl.zeros((BM, BK), tl.float32),)
                for j in tl.static_range(S_IN):
                    at = rows * IN + j * G_IN + k[None, :]
                    mask = live & (k < G_IN)[None, :]
                    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
                    new = ()
                    for i in tl.static_range(S_OUT):
                        weight = tl.load(s_ptr + (r * S_OUT + i) * S_IN + j).to(tl.float32)
                        new = new + (us[i] + weight * x,)
                    us = new
            new = ()
            for c in tl.static_range(CHUNKS):
                g = first + c * BG + tl.arange(0, BG)
                at = r * G_OUT * G_IN + g[None, :] * G_IN + k[:, None]
                mask = (g < G_OUT)[None, :] & (k < G_IN)[:, None]
                big = tl.load(g_ptr + at, mask=mask, other=0.0)
                for i in tl.static_range(S_OUT):
                    u = us[i].to(dtype)
                    y = tl.dot(u, big, ys[c * S_OUT + i], input_precision="ieee")
                    new = new + (y,)
            ys = new
    for c in tl.static_range(CHUNKS):
        g = first + c * BG + tl.arange(0, BG)
        if JOIN:
            parts = ()
            for i in tl.static_range(S_OUT):
                parts = parts + (ys[c * S_OUT + i],)
            at = (first + c * BG) * S_OUT + tl.arange(0, BG * S_OUT)[None, :]
            y = interleave(parts, S_OUT)
            mask = live & (at < OUT)
            finish(
                y, rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD, ACT
            )
        else:
            for i in tl.static_range(S_OUT):
                at = i * YS + g[None, :] * YG
                mask = live & (g < G_OUT)[None, :]
                y = ys[c * S_OUT + i]
                finish(
                    y, rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD,
                    ACT,
                )  # fmt: skip


@triton.jit
def small_big_kernel(
    x_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    g0_ptr,
    g1_ptr,
    g2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    partial_ptr,
    dy_ptr,
    n,
    MAPS: tl.constexpr,
    BIG_FIRST: tl.constexpr,
    RANK: tl.constexpr,
    S_OUT: tl.constexpr,
    S_IN: tl.constexpr,
    G_OUT: tl.constexpr,
    G_IN: tl.constexpr,
    SMALL_IS_B: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
):
    """MAPS (1 or 3) maps of one tile of rows, which stays in cache from one map to the next."""
    blocks: tl.constexpr = tl.cdiv(G_OUT, BG * CHUNKS)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks
    for p in range(MAPS):  # not unrolled: what three maps share would crowd the registers
        small = pick(s0_ptr, s1_ptr, s2_ptr, p)
        big = pick(g0_ptr, g1_ptr, g2_ptr, p)
        bias = pick(bias0_ptr, bias1_ptr, bias2_ptr, p)
        y = pick(y0_ptr, y1_ptr, y2_ptr, p)
        if BIG_FIRST:
            _big_first(
                x_ptr, small, big, bias, partial_ptr, dy_ptr, y, n, tile, column, RANK,
                S_OUT, S_IN, G_OUT, G_IN, SMALL_IS_B, ADD, BIAS, GRAD, ACT, BM, BG, CHUNKS, BK,
            )  # fmt: skip
        else:
            _small_first(
                x_ptr, small, big, bias, partial_ptr, dy_ptr, y, n, tile, column, RANK,
                S_OUT, S_IN, G_OUT, G_IN, SMALL_IS_B, ADD, BIAS, GRAD, ACT, BM, BG, CHUNKS, BK,
            )  # fmt: skip


def launch(
    x: Tensor, a: list[Tensor], b: list[Tensor], ys: list[Tensor], side: Sides, ending: Ending
) -> None:
    """ys[p] = ending(x · (sum_r a[p][r] ⊗ b[p][r])ᵀ) for one or three p of one shape."""
    small, big = (b, a) if side.small_is_b else (a, b)
    rank = a[0].shape[0]
    t = tiles(side, rank, x.dtype)
    grid = (triton.cdiv(x.shape[0], t.rows) * triton.cdiv(side.g_out, t.columns * t.chunks),)
    with torch.cuda.device_of(x):
        small_big_kernel[grid](
            x,
            *three(small),
            *three(big),
            *ending.pointers(ys),
            x.shape[0],
            MAPS=len(ys),
            BIG_FIRST=side.big_first,
            RANK=rank,
            S_OUT=side.s_out,
            S_IN=side.s_in,
            G_OUT=side.g_out,
            G_IN=side.g_in,
            SMALL_IS_B=side.small_is_b,
            **ending.flags(),
            BM=t.rows,
            BG=t.columns,
            CHUNKS=t.chunks,
            BK=t.depth,
            num_warps=t.warps,
            num_stages=t.stages,
        )
