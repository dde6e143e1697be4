"""``a ⊗ b`` with two matrices for tensor cores, such as 48x48 ⊗ 16x16; and every shape at all.

One matrix (first) meets x, the result is turned on chip, the other (second) meets that. Element
(h, f) of x, h along the second and f along the first matrix, lies at h * XH + f * XF, so one kernel
serves both orders. Sizes that are no multiple of a block are masked.
"""

# ruff: noqa: RUF005  -- Triton's tuples grow by +, they have no unpacking

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shapes import KroneckerShape
from .epilogue import Ending, finish, pick, three
from .small_big import block


class Tiles(NamedTuple):
    """Rows; blocks along h_in, h_out, f_in, f_out; blocks of h_out per program; launch options."""

    rows: int
    h_in: int
    h_out: int
    f_in: int
    f_out: int
    chunks: int
    warps: int
    stages: int


def tiles(shape: KroneckerShape, dtype: torch.dtype) -> Tiles:
    """Block sizes and launch options: 128 (row, column) pairs meet either matrix in fp16 and bf16.

    Chosen so that nothing spills when compiled for sm_80, sm_90 and sm_100, not by timing."""
    half = dtype != torch.float32
    second, first = (shape.a_out, shape.a_in), (shape.b_out, shape.b_in)
    if shape.order == "a":
        second, first = first, second
    h_out = block(second[0], 32 if half else 16)
    h_in = block(second[1], 32 if half else 16)
    f_out, f_in = block(first[0], 32 if half else 16), block(first[1], 32)
    rows = max(1, (128 if half else 64) // max(f_out, h_in))
    whole = triton.cdiv(second[0], h_out)
    # The turned result serves every chunk: 64 accumulator registers a thread, of 4 warps.
    most = max(1, 64 * 128 // (rows * f_out * h_out))
    chunks = max(c for c in range(1, whole + 1) if whole % c == 0 and c <= most)
    return Tiles(rows, h_in, h_out, f_in, f_out, chunks, 4, 2)


@triton.jit
def _two_dot(
    x_ptr,
    h_ptr,
    f_ptr,
    bias_ptr,
    partial_ptr,
    dy_ptr,
    y_ptr,
    n,
    tile,
    column,
    RANK: tl.constexpr,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    F_OUT: tl.constexpr,
    F_IN: tl.constexpr,
    B_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BHI: tl.constexpr,
    BHO: tl.constexpr,
    BFI: tl.constexpr,
    BFO: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    IN: tl.constexpr = H_IN * F_IN
    OUT: tl.constexpr = H_OUT * F_OUT
    XH: tl.constexpr = F_IN if B_FIRST else 1
    XF: tl.constexpr = 1 if B_FIRST else H_IN
    YH: tl.constexpr = F_OUT if B_FIRST else 1
    YF: tl.constexpr = 1 if B_FIRST else H_OUT
    F_BLOCKS: tl.constexpr = tl.cdiv(F_OUT, BFO)
    f_out = (column % F_BLOCKS) * BFO + tl.arange(0, BFO)
    first = (column // F_BLOCKS) * CHUNKS * BHO
    dtype = x_ptr.dtype.element_ty
    pair = tl.arange(0, BM * BHI)  # (row, h_in)
    x_row = (tile * BM + pair // BHI).to(tl.int64)[:, None]
    ys = ()
    for _ in tl.static_range(CHUNKS):
        ys = ys + (tl.zeros((BM * BFO, BHO), tl.float32),)
    for r in range(RANK):
        for h0 in range(0, H_IN, BHI):
            h = h0 + pair % BHI
            z = tl.zeros((BM * BHI, BFO), tl.float32)
            for f0 in range(0, F_IN, BFI):
                f = f0 + tl.arange(0, BFI)
                at = x_row * IN + (h[:, None] * XH + f[None, :] * XF)
                mask = (x_row < n) & (h < H_IN)[:, None] & (f < F_IN)[None, :]
                x = tl.load(x_ptr + at, mask=mask, other=0.0)
                at = (r * F_OUT + f_out[None, :]) * F_IN + f[:, None]
                mask = (f_out < F_OUT)[None, :] & (f < F_IN)[:, None]
                matrix = tl.load(f_ptr + at, mask=mask, other=0.0)
                z = tl.dot(x, matrix, z, input_precision="ieee")
            turned = tl.permute(tl.reshape(z.to(dtype), (BM, BHI, BFO)), (0, 2, 1))
            turned = tl.reshape(turned, (BM * BFO, BHI))
            h_in = h0 + tl.arange(0, BHI)
            new = ()
            for c in tl.static_range(CHUNKS):
                h_out = first + c * BHO + tl.arange(0, BHO)
                at = (r * H_OUT + h_out[None, :]) * H_IN + h_in[:, None]
                mask = (h_out < H_OUT)[None, :] & (h_in < H_IN)[:, None]
                matrix = tl.load(h_ptr + at, mask=mask, other=0.0)
                new = new + (tl.dot(turned, matrix, ys[c], input_precision="ieee"),)
            ys = new
    pair = tl.arange(0, BM * BFO)  # (row, f_out)
    rows = (tile * BM + pair // BFO).to(tl.int64)[:, None]
    f = (column % F_BLOCKS) * BFO + pair % BFO
    for c in tl.static_range(CHUNKS):
        h_out = first + c * BHO + tl.arange(0, BHO)
        at = f[:, None] * YF + h_out[None, :] * YH
        mask = (rows < n) & (f < F_OUT)[:, None] & (h_out < H_OUT)[None, :]
        finish(
            ys[c], rows, at, mask, partial_ptr, bias_ptr, dy_ptr, y_ptr, OUT, ADD, BIAS, GRAD, ACT
        )


@triton.jit
def two_dot_kernel(
    x_ptr,
    h0_ptr,
    h1_ptr,
    h2_ptr,
    f0_ptr,
    f1_ptr,
    f2_ptr,
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
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    F_OUT: tl.constexpr,
    F_IN: tl.constexpr,
    B_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BHI: tl.constexpr,
    BHO: tl.constexpr,
    BFI: tl.constexpr,
    BFO: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """MAPS (1 or 3) maps of one tile of rows, which stays in cache from one map to the next."""
    blocks: tl.constexpr = tl.cdiv(F_OUT, BFO) * tl.cdiv(H_OUT, BHO * CHUNKS)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks
    for p in range(MAPS):  # not unrolled: what three maps share would crowd the registers
        second = pick(h0_ptr, h1_ptr, h2_ptr, p)
        first = pick(f0_ptr, f1_ptr, f2_ptr, p)
        bias = pick(bias0_ptr, bias1_ptr, bias2_ptr, p)
        y = pick(y0_ptr, y1_ptr, y2_ptr, p)
        _two_dot(
            x_ptr, second, first, bias, partial_ptr, dy_ptr, y, n, tile, column, RANK,
            H_OUT, H_IN, F_OUT, F_IN, B_FIRST, ADD, BIAS, GRAD, ACT, BM, BHI, BHO, BFI, BFO, CHUNKS,
        )  # fmt: skip


def launch(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    ys: list[Tensor],
    shape: KroneckerShape,
    ending: Ending,
) -> None:
    """ys[p] = ending(x · (sum_r a[p][r] ⊗ b[p][r])ᵀ) for one or three p of one shape."""
    b_first = shape.order == "b"
    second, first = (a, b) if b_first else (b, a)
    t = tiles(shape, x.dtype)
    (_, h_out, h_in), (_, f_out, f_in) = second[0].shape, first[0].shape
    blocks = triton.cdiv(f_out, t.f_out) * triton.cdiv(h_out, t.h_out * t.chunks)
    with torch.cuda.device_of(x):
        two_dot_kernel[(triton.cdiv(x.shape[0], t.rows) * blocks,)](
            x,
            *three(second),
            *three(first),
            *ending.pointers(ys),
            x.shape[0],
            MAPS=len(ys),
            RANK=a[0].shape[0],
            H_OUT=h_out,
            H_IN=h_in,
            F_OUT=f_out,
            F_IN=f_in,
            B_FIRST=b_first,
            **ending.flags(),
            BM=t.rows,
            BHI=t.h_in,
            BHO=t.h_out,
            BFI=t.f_in,
            BFO=t.f_out,
            CHUNKS=t.chunks,
            num_warps=t.warps,
            num_stages=t.stages,
        )
