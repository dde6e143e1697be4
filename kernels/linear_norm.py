"""``LN(residual + dropout(kron_linear(x) + bias))`` in one kernel: a row's sums stay on chip.

For ``a ⊗ b`` with one small and one big matrix where the small one meets x first: slices of x are
mixed and the mixtures multiplied by the big matrix. The papers' shapes: a 2x16 ⊗ b 384x192 (a
small: a slice is contiguous) and a 384x48 ⊗ b 2x16 (b small: a slice is every b_in-th number, and
outputs are interleaved). `fits` says which shapes run here; for the others a linear kernel and
`kronbert.kernels.norm` do the same in two launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from ..shapes import KroneckerShape
from .epilogue import interleave
from .norm_tile import (
    Normed,
    check_norm,
    dropout,
    new_normed,
    norm_tile,
    require_dtype,
    require_rows,
    require_size,
)

WIDEST = 1024
"""Outputs per row whose fp32 sums fit beside everything else in registers."""

LARGEST_SMALL = 64
"""Entries of the small matrix: each is a multiply-add per element of a slice."""


MOST_SHARED = 72 * 1024
"""Bytes of the big matrix in shared memory at once: the rest of a step takes up to 20 KiB, and the
smallest cards (compute capabilities 8.6, 8.9 and 12.0) have 99."""


class Plan(NamedTuple):
    """A shape seen from its small matrix, and how one program runs it.

    small (s_out, s_in), big (g_out, g_in); rows: of a program; columns: of the big matrix per
    product, depth: of each step along g_in; warps and stages: launch options."""

    small_is_b: bool
    s_out: int
    s_in: int
    g_out: int
    g_in: int
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def plan(shape: KroneckerShape, dtype: torch.dtype) -> Plan | None:
    """How one launch runs ``shape``, or None where it does not fit."""
    a, b = (shape.a_out, shape.a_in), (shape.b_out, shape.b_in)
    small_is_b = b[0] * b[1] < a[0] * a[1]
    (s_out, s_in), (g_out, g_in) = (b, a) if small_is_b else (a, b)
    # b = 1 x 8 and the like: outputs interleave by powers of two, slices lie in one padded tile.
    small_fits = s_out in (1, 2, 4) and s_in <= 32 if small_is_b else s_out <= 8 and s_in <= 32
    columns = _power(g_out, 128)
    dear = shape.flops("b" if small_is_b else "a") > 1.1 * shape.flops()
    if not small_fits or s_out * s_in > LARGEST_SMALL or dear:
        return None
    if columns < 16 or shape.out_features > WIDEST or shape.rank > 4:
        return None
    held = shape.rank * (s_in if small_is_b else s_out)
    sizes = tiles(shape.out_features, held, columns, g_in, dtype)
    run = Plan(small_is_b, s_out, s_in, g_out, g_in, *sizes)
    return _shared(run, shape.rank, 16, dtype)  # 32 spill: 4:2x16*384x192 on sm_90


def _shared(run: Plan, rank: int, rows: int, dtype: torch.dtype) -> Plan | None:
    """``run`` with steps that leave what they read of all terms' big matrices in `MOST_SHARED`, and
    ``rows`` of a program where they had to be halved for it; None where 16 deep are too much."""
    while rank * run.g_out * run.depth * dtype.itemsize > MOST_SHARED:
        if run.depth <= 16:
            return None
        run = run._replace(rows=rows, depth=run.depth // 2)
    return run


def fits(shape: KroneckerShape, dtype: torch.dtype) -> bool:
    """Whether `linear_norm` runs ``shape``; decided by sizes alone."""
    return plan(shape, dtype) is not None


def tiles(
    out: int, held: int, columns: int, g_in: int, dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages): chosen by registers and spills when compiled for
    sm_80, sm_90 and sm_100, not timed.

    held: slices of a step in registers beside the row of ``out`` fp32 sums."""
    if dtype == torch.float32:
        return 16, min(columns, 64), 16, 4 if out <= 384 else 8, 2
    depth = max(16, _power(g_in, 64 if held <= 4 else 32))
    return 32 if out <= 768 else 16, columns, depth, 8, 2


def _power(size: int, largest: int) -> int:
    """The largest power of two that divides ``size``, up to ``largest``."""
    return min(size & -size, largest)


@triton.jit
def mixed_slices(
    x,
    small,
    rows,
    n,
    k,
    r,
    S_OUT: tl.constexpr,
    S_IN: tl.constexpr,
    G_IN: tl.constexpr,
    SMALL_IS_B: tl.constexpr,
):
    """S_OUT mixtures of x's S_IN slices at depths k (bk,): a tuple of (m, bk), fp32."""
    base = rows.to(tl.int64) * (S_IN * G_IN)
    mixed = ()
    if SMALL_IS_B:
        # One contiguous (m, bk, s_in) tile, reduced by each row of b.
        PADDED: tl.constexpr = triton.next_power_of_2(S_IN)
        j = tl.arange(0, PADDED)
        at = base[:, None, None] + k[None, :, None] * S_IN + j[None, None, :]
        mask = (rows < n)[:, None, None] & (j < S_IN)[None, None, :] & (k < G_IN)[None, :, None]
        tile = tl.load(x + at, mask=mask, other=0).to(tl.float32)
        for i in tl.static_range(S_OUT):
            entries = tl.load(small + (r * S_OUT + i) * S_IN + j, mask=j < S_IN, other=0)
            mixed += (tl.sum(tile * entries.to(tl.float32)[None, None, :], 2),)
    else:
        for _ in tl.static_range(S_OUT):
            mixed += (tl.zeros((rows.shape[0], k.shape[0]), tl.float32),)
        for j in tl.static_range(S_IN):
            at = base[:, None] + j * G_IN + k[None, :]
            mask = (rows < n)[:, None] & (k < G_IN)[None, :]
            tile = tl.load(x + at, mask=mask, other=0).to(tl.float32)
            added = ()
            for i in tl.static_range(S_OUT):
                entry = tl.load(small + (r * S_OUT + i) * S_IN + j).to(tl.float32)
                added += (mixed[i] + entry * tile,)
            mixed = added
    return mixed


@triton.jit
def _linear_norm_kernel(
    x,
    small,
    big,
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
    RANK: tl.constexpr,
    S_OUT: tl.constexpr,
    S_IN: tl.constexpr,
    G_OUT: tl.constexpr,
    G_IN: tl.constexpr,
    SMALL_IS_B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """small None: x (n, S_OUT, RANK, G_IN) holds the mixtures already."""
    CHUNKS: tl.constexpr = G_OUT // COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = ()
    for _ in tl.static_range(S_OUT * CHUNKS):
        sums += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for k0 in range(0, G_IN, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        for r in tl.static_range(RANK):
            if small is None:
                mixed = ()
                for i in tl.static_range(S_OUT):
                    at = rows.to(tl.int64)[:, None] * (S_OUT * RANK * G_IN) + k[None, :]
                    at += (i * RANK + r) * G_IN
                    mask = (rows < n)[:, None] & (k < G_IN)[None, :]
                    mixed += (tl.load(x + at, mask=mask, other=0),)
            else:
                mixed = mixed_slices(x, small, rows, n, k, r, S_OUT, S_IN, G_IN, SMALL_IS_B)
            added = ()
            for c in tl.static_range(CHUNKS):
                g = c * COLUMNS + tl.arange(0, COLUMNS)
                at = (r * G_OUT + g[None, :]) * G_IN + k[:, None]
                tile = tl.load(big + at, mask=(k < G_IN)[:, None], other=0)
                for i in tl.static_range(S_OUT):
                    operand = mixed[i].to(x.dtype.element_ty)
                    part = tl.dot(operand, tile, sums[c * S_OUT + i], input_precision="ieee")
                    added += (part,)
            sums = added
    # Blocks of the row in its own order, COLUMNS wide (a small) or S_OUT * COLUMNS (b small).
    parts = ()
    if SMALL_IS_B:
        for c in tl.static_range(CHUNKS):
            together = ()
            for i in tl.static_range(S_OUT):
                together += (sums[c * S_OUT + i],)
            parts += (interleave(together, S_OUT),)
    else:
        for i in tl.static_range(S_OUT):
            for c in tl.static_range(CHUNKS):
                parts += (sums[c * S_OUT + i],)
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
        S_OUT * G_OUT,
        CHUNKS if SMALL_IS_B else S_OUT * CHUNKS,
        S_OUT * COLUMNS if SMALL_IS_B else COLUMNS,
    )


def linear_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
) -> Normed:
    """``LN(residual + dropout(kron_linear(x, a, b, shift))) * weight + bias``.

    x (n, a_in * b_in), a (rank, a_out, a_in), b (rank, b_out, b_in); shift (the linear map's bias),
    weight, bias (out); residual (n, out). p, seed, keep: as `norm.residual_norm` takes them.
    Defined by `kronbert.reference.kron_linear` and `torch.nn.functional.layer_norm`. Raises
    `ShapeError` for a shape that does not fit."""
    shape = KroneckerShape(a.shape[1], a.shape[2], b.shape[1], b.shape[2], a.shape[0])
    run = plan(shape, x.dtype)
    if run is None:
        raise ShapeError(
            f"linear_norm: {shape} does not fit one kernel. Use linear() and residual_norm()."
        )
    require_size("linear_norm", (x.shape[0], shape.in_features), x=x)
    require_rows("linear_norm", x=x, a=a, b=b, shift=shift, seed=seed)
    small, big = (b, a) if run.small_is_b else (a, b)
    return _launch(
        "linear_norm", x, small, big, run, shift, residual, weight, bias, eps, p, seed, keep
    )


def slices_norm(
    u: Tensor,
    b: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
) -> Normed:
    """`linear_norm` from the mixtures on: u (n, a_out, rank, b_in), b (rank, b_out, b_in).

    Outputs (n, a_out * b_out): slice i is the sum of ``b[r] · u[i, r]``."""
    n, s_out, rank, g_in = u.shape
    run = slices_plan(s_out, rank, b.shape[1], g_in, u.dtype)
    require_size("slices_norm", (rank, b.shape[1], g_in), b=b)
    require_rows("slices_norm", u=u, b=b, shift=shift, seed=seed)
    if run is None:
        raise ShapeError(
            f"slices_norm: {s_out} slices of {b.shape[1]}x{g_in} do not fit one kernel. Use "
            "torch.matmul and residual_norm()."
        )
    rows = u.view(n, s_out * rank * g_in)
    return _launch(
        "slices_norm", rows, None, b, run, shift, residual, weight, bias, eps, p, seed, keep
    )


def slices_plan(s_out: int, rank: int, g_out: int, g_in: int, dtype: torch.dtype) -> Plan | None:
    """How `slices_norm` runs s_out products with each of ``rank`` (g_out, g_in) matrices, or
    None."""
    columns = _power(g_out, 128)
    if s_out > 8 or columns < 16 or s_out * g_out > WIDEST:
        return None
    # Without mixing the products are issued sooner and hold more operands: steps half as deep.
    sizes = tiles(s_out * g_out, 2 * max(s_out, 4), columns, g_in, dtype)
    run = Plan(False, s_out, s_out, g_out, g_in, *sizes)
    return _shared(run, rank, run.rows, dtype)


def _launch(
    op: str,
    x: Tensor,
    small: Tensor | None,
    big: Tensor,
    run: Plan,
    shift: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> Normed:
    out = run.s_out * run.g_out
    require_size(op, (out,), weight=weight, shift=shift)
    rows = residual if residual is not None else x.new_empty(x.shape[0], out)
    check_norm(op, rows, rows, weight, bias)
    require_dtype(op, x=x, big=big, small=small, residual=residual)
    drop = dropout(op, p, seed)
    normed = new_normed(x, out, keep)
    if x.shape[0] == 0:
        return normed
    with torch.cuda.device_of(x):
        _linear_norm_kernel[(triton.cdiv(x.shape[0], run.rows),)](
            x,
            small,
            big,
            shift,
            residual,
            weight,
            bias,
            *normed,
            drop.seed,
            x.shape[0],
            drop.threshold,
            drop.scale,
            eps,
            RANK=big.shape[0],
            S_OUT=run.s_out,
            S_IN=run.s_in,
            G_OUT=run.g_out,
            G_IN=run.g_in,
            SMALL_IS_B=run.small_is_b,
            ROWS=run.rows,
            COLUMNS=run.columns,
            DEPTH=run.depth,
            num_warps=run.warps,
            num_stages=run.stages,
        )
    return normed
