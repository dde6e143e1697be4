"""The low-rank member (out x 1) ⊗ (1 x in) of rank r: two thin products, t (n, r) stays on chip."""

# ruff: noqa: RUF005  -- Triton's tuples grow by +, they have no unpacking

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import Ending, finish, pick, three
from .small_big import block

LARGEST_RANK = 256
"""Terms one launch can sum; more are summed over several launches."""


class Tiles(NamedTuple):
    """Rows, ranks per chunk, chunks, depth per step, columns per step; launch options."""

    rows: int
    rank: int
    chunks: int
    depth: int
    columns: int
    warps: int
    stages: int


def tiles(rank: int, out: int, inner: int, dtype: torch.dtype) -> Tiles:
    """Block sizes and launch options; t takes at most 64 registers a thread.

    Chosen so that nothing spills when compiled for sm_80, sm_90 and sm_100, not by timing."""
    half = dtype != torch.float32
    ranks = block(rank, 64)
    chunks = triton.cdiv(rank, ranks)
    rows = 64 if half else 32
    return Tiles(rows, ranks, chunks, block(inner, 64 if half else 32), block(out, 64), 8, 2)


@triton.jit
def _low_rank(
    x_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    partial_ptr,
    dy_ptr,
    y_ptr,
    n,
    RANK: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    live = rows < n
    ts = ()
    for _ in tl.static_range(CHUNKS):
        ts = ts + (tl.zeros((BM, BR), tl.float32),)
    for k0 in range(0, IN, BK):
        k = k0 + tl.arange(0, BK)
        mask = live & (k < IN)[None, :]
        x = tl.load(x_ptr + rows * IN + k[None, :], mask=mask, other=0.0)
        new = ()
        for c in tl.static_range(CHUNKS):
            r = c * BR + tl.arange(0, BR)
            mask = (r < RANK)[None, :] & (k < IN)[:, None]
            b = tl.load(b_ptr + r[None, :] * IN + k[:, None], mask=mask, other=0.0)
            new = new + (tl.dot(x, b, ts[c], input_precision="ieee"),)
        ts = new
    thin = ()
    for c in tl.static_range(CHUNKS):
        thin = thin + (ts[c].to(x_ptr.dtype.element_ty),)
    for o0 in range(0, OUT, BN):
        o = o0 + tl.arange(0, BN)
        y = tl.zeros((BM, BN), tl.float32)
        for c in tl.static_range(CHUNKS):
            r = c * BR + tl.arange(0, BR)
            mask = (r < RANK)[:, None] & (o < OUT)[None, :]
            a = tl.load(a_ptr + r[:, None] * OUT + o[None, :], mask=mask, other=0.0)
            y = tl.dot(thin[c], a, y, input_precision="ieee")
        mask = live & (o < OUT)[None, :]
        at = o[None, :]
        finish(y, rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD, ACT)


@triton.jit
def low_rank_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
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
    RANK: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    CHUNKS: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """MAPS (1 or 3) maps of one tile of rows, which stays in cache from one map to the next."""
    for p in range(MAPS):  # not unrolled: what three maps share would crowd the registers
        a = pick(a0_ptr, a1_ptr, a2_ptr, p)
        b = pick(b0_ptr, b1_ptr, b2_ptr, p)
        bias = pick(bias0_ptr, bias1_ptr, bias2_ptr, p)
        y = pick(y0_ptr, y1_ptr, y2_ptr, p)
        _low_rank(
            x_ptr, a, b, bias, partial_ptr, dy_ptr, y, n, RANK, OUT, IN, ADD, BIAS,
            GRAD, ACT, BM, BR, CHUNKS, BK, BN,
        )  # fmt: skip


def launch(x: Tensor, a: list[Tensor], b: list[Tensor], ys: list[Tensor], ending: Ending) -> None:
    """ys[p] = ending(x · bᵀ · a) for one or three p: a (r, out, 1), b (r, 1, in)."""
    rank, out, _ = a[0].shape
    inner = b[0].shape[2]
    t = tiles(rank, out, inner, x.dtype)
    with torch.cuda.device_of(x):
        low_rank_kernel[(triton.cdiv(x.shape[0], t.rows),)](
            x,
            *three(a),
            *three(b),
            *ending.pointers(ys),
            x.shape[0],
            MAPS=len(ys),
            RANK=rank,
            OUT=out,
            IN=inner,
            **ending.flags(),
            BM=t.rows,
            BR=t.rank,
            CHUNKS=t.chunks,
            BK=t.depth,
            BN=t.columns,
            num_warps=t.warps,
            num_stages=t.stages,
        )
