"""Gradients of `linear` and `qkv`: dx by the forward kernels, the matrices' by plain products.

``dx = dy · (aᵀ ⊗ bᵀ)ᵀ`` is a forward pass with transposed matrices. For the gradients of a and b,
"small" is the matrix with fewer entries, "narrow" the side of it with fewer slices: x if
s_in <= s_out, else dy; "wide" is the other side. With M[r, i, j] the small matrix from narrow
slice j to wide slice i, and g[r] the big one from narrow to wide::

    v[n, j, r] = sum_i M[r, i, j] wide[n, i]     dg[r] = sum_n,j v[n, j, r] narrow[n, j]ᵀ
    z[n, j, r] = g[r] narrow[n, j]               dM[r, i, j] = sum_n <wide[n, i], z[n, j, r]>

v and z, as large as the narrow side times rank * g_wide / g_narrow, are the only intermediates; z
is made again, not kept from forward. v and dM are Triton kernels, dg and z one `torch.matmul` each.
"""

# ruff: noqa: RUF005  -- Triton's tuples grow by +, they have no unpacking

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from .gelu import Activation
from .linear import check, launches, linear, require_contiguous, run_sum
from .small_big import LARGEST_SMALL, block

Need = tuple[bool, bool, bool, bool]
Gradients = tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None, Tensor | None]


def linear_backward(
    dy: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation = None,
    need: Need = (True, True, True, True),
) -> Gradients:
    """Gradients of `linear` for dy (n, out): dx (n, in), [da], [db], dbias (out).

    need: which of x, a, b, bias; None stands for the others and for a missing bias. With an
    activation, x · Wᵀ + bias is computed again. Everything is summed in float32, in an order that
    depends on the sizes alone. Raises `ShapeError` as `linear` does."""
    if activation is not None:
        dy = linear(x, a, b, bias, activation, dy=dy)
    else:
        _check_gradient("linear_backward", dy, x, check("linear_backward", x, a, b, bias))
        require_contiguous("linear_backward", dy=dy, x=x, a=list(a), b=list(b))
    dx = None
    if need[0]:
        dx = linear(dy, [_turn(one) for one in a], [_turn(one) for one in b])
    pairs = [_matrices(dy, x, *pair, need[1:3]) for pair in zip(a, b, strict=True)]
    das, dbs = [da for da, _ in pairs if da is not None], [db for _, db in pairs if db is not None]
    dbias = _column_sum(dy) if need[3] and bias is not None else None
    return dx, das if need[1] else None, dbs if need[2] else None, dbias


def qkv_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: bool,
    need: Need = (True, True, True, True),
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None, list[Tensor] | None]:
    """Gradients of `qkv` for three dy (n, out): dx, three da, three db, three dbias.

    bias: whether the maps have one; need as for `linear_backward`."""
    for dy, one_a, one_b in zip(dys, a, b, strict=True):
        _check_gradient("qkv_backward", dy, x, check("qkv_backward", x, [one_a], [one_b], None))
    require_contiguous("qkv_backward", dy=list(dys), x=x, a=list(a), b=list(b))
    dx = None
    if need[0]:
        dx = torch.empty_like(x)
        if x.shape[0]:
            maps = zip(dys, a, b, strict=True)
            run_sum([(dy, *s) for dy, p, q in maps for s in launches(_turn(p), _turn(q))], dx)
    pairs = [_matrices(dys[p], x, a[p], b[p], need[1:3]) for p in range(3)]
    das, dbs = [da for da, _ in pairs if da is not None], [db for _, db in pairs if db is not None]
    dbias = [_column_sum(dy) for dy in dys] if need[3] and bias else None
    return dx, das if need[1] else None, dbs if need[2] else None, dbias


def _check_gradient(where: str, dy: Tensor, x: Tensor, out: int) -> None:
    if dy.shape != (x.shape[0], out) or dy.dtype != x.dtype or dy.device != x.device:
        raise ShapeError(
            f"{where}: dy {tuple(dy.shape)} of {dy.dtype} on {dy.device}: expected "
            f"{(x.shape[0], out)} of {x.dtype} on {x.device}, the gradient of the output."
        )


def _turn(matrix: Tensor) -> Tensor:
    """matrix[r]ᵀ for every r, contiguous."""
    return matrix.transpose(1, 2).contiguous()


def _column_sum(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.float32).to(dy.dtype)


class Narrow(NamedTuple):
    """One group seen from its narrow side; see the module's docstring.

    wide_s, wide_g: strides of a slice and of an element of a slice of the wide side."""

    wide: Tensor
    narrow: Tensor
    small: Tensor
    big: Tensor
    turned: bool
    slices_wide: int
    slices_narrow: int
    g_wide: int
    g_narrow: int
    wide_s: int
    wide_g: int


def _narrow(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Narrow:
    small_is_b = b[0].numel() <= a[0].numel()
    small, big = (b, a) if small_is_b else (a, b)
    (_, s_out, s_in), (_, g_out, g_in) = small.shape, big.shape
    turned = s_in > s_out
    wide, narrow = (x, dy) if turned else (dy, x)
    s_wide, s_narrow, g_wide, g_narrow = (
        (s_in, s_out, g_in, g_out) if turned else (s_out, s_in, g_out, g_in)
    )
    if small_is_b:  # slices of the narrow side one after the other, for a plain product
        narrow = narrow.view(-1, g_narrow, s_narrow).transpose(1, 2)
    narrow = narrow.reshape(-1, g_narrow)
    strides = (1, s_wide) if small_is_b else (g_wide, 1)
    return Narrow(
        wide, narrow, small, big, turned, s_wide, s_narrow, g_wide, g_narrow, *strides
    )  # fmt: skip


def _matrices(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(da, db) of one group, those that are needed."""
    if a.shape[2] == 1 and b.shape[1] == 1:
        return _low_rank_matrices(dy, x, a, b, need)
    small_is_b = b[0].numel() <= a[0].numel()
    need_small, need_big = (need[1], need[0]) if small_is_b else need
    if not (need_small or need_big):
        return None, None
    g = _narrow(dy, x, a, b)
    rank = a.shape[0]
    d_small = d_big = None
    if need_big:
        v = mix(g)
        d_big = v.view(-1, rank * g.g_wide).T @ g.narrow
        d_big = d_big.view(rank, g.g_wide, g.g_narrow)
        d_big = _turn(d_big) if g.turned else d_big
    if need_small:
        matrix = _turn(g.big) if g.turned else g.big
        z = g.narrow @ matrix.view(rank * g.g_wide, g.g_narrow).T
        d_small = inner_products(g, z, rank).permute(2, 0, 1)  # (rank, wide, narrow)
        d_small = (d_small.transpose(1, 2) if g.turned else d_small).contiguous()
    return (d_big, d_small) if small_is_b else (d_small, d_big)


def _low_rank_matrices(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(da, db) of (out x 1) ⊗ (1 x in): plain products."""
    da = db = None
    if need[0]:
        da = ((x @ b[:, 0].T).T @ dy).unsqueeze(2)
    if need[1]:
        db = ((dy @ a[:, :, 0].T).T @ x).unsqueeze(1)
    return da, db


def mix(g: Narrow) -> Tensor:
    """v[n, j, r] = sum_i M[r, i, j] wide[n, i]: (n, narrow slices, rank, g_wide)."""
    n, rank = g.wide.shape[0], g.small.shape[0]
    v = g.wide.new_empty(n, g.slices_narrow, rank, g.g_wide)
    if g.small[0].numel() > LARGEST_SMALL:
        wide = g.wide.as_strided(
            (n, g.slices_wide, g.g_wide), (g.slices_wide * g.g_wide, g.wide_s, g.wide_g)
        )
        matrix = g.small.permute(1, 0, 2) if g.turned else g.small.permute(2, 0, 1)
        matrix = matrix.reshape(g.slices_narrow * rank, g.slices_wide)
        return torch.matmul(matrix, wide).view(v.shape)
    if n == 0:
        return v
    columns = block(g.g_wide, 128)
    rows = 1024 // columns
    grid = (triton.cdiv(n, rows) * triton.cdiv(g.g_wide, columns),)
    with torch.cuda.device_of(v):
        _mix_kernel[grid](
            g.wide,
            g.small,
            v,
            n,
            RANK=rank,
            WIDE=g.slices_wide,
            NARROW=g.slices_narrow,
            G=g.g_wide,
            WS=g.wide_s,
            WG=g.wide_g,
            MI=1 if g.turned else g.slices_narrow,
            MJ=g.slices_wide if g.turned else 1,
            BM=rows,
            BG=columns,
            num_warps=4,
        )
    return v


@triton.jit
def _mix_kernel(
    wide_ptr,
    m_ptr,
    v_ptr,
    n,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    G: tl.constexpr,
    WS: tl.constexpr,
    WG: tl.constexpr,
    MI: tl.constexpr,
    MJ: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
):
    """M[r, i, j] lies at r * WIDE * NARROW + i * MI + j * MJ."""
    blocks: tl.constexpr = tl.cdiv(G, BG)
    rows = ((tl.program_id(0) // blocks) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    g = (tl.program_id(0) % blocks) * BG + tl.arange(0, BG)[None, :]
    mask = (rows < n) & (g < G)
    for r in range(RANK):
        vs = ()
        for _ in tl.static_range(NARROW):
            vs = vs + (tl.zeros((BM, BG), tl.float32),)
        for i in tl.static_range(WIDE):
            at = rows * (WIDE * G) + (i * WS + g * WG)
            wide = tl.load(wide_ptr + at, mask=mask, other=0.0).to(tl.float32)
            new = ()
            for j in tl.static_range(NARROW):
                weight = tl.load(m_ptr + r * (WIDE * NARROW) + i * MI + j * MJ).to(tl.float32)
                new = new + (vs[j] + weight * wide,)
            vs = new
        for j in tl.static_range(NARROW):
            at = ((rows * NARROW + j) * RANK + r) * G + g
            tl.store(v_ptr + at, vs[j].to(v_ptr.dtype.element_ty), mask=mask)


PROGRAMS = 512
"""Row blocks whose sums are added up in a second step; a few per multiprocessor of a large GPU."""


def inner_products(g: Narrow, z: Tensor, rank: int) -> Tensor:
    """dM[i, j, r] = sum_n <wide[n, i], z[n, j, r]>, z (n * narrow slices, rank * g_wide).

    Sums of blocks of rows in float32, then the sum of those: the same every time."""
    n, columns = g.wide.shape[0], g.slices_narrow * rank
    out = (g.slices_wide, g.slices_narrow, rank)
    if n == 0:
        return z.new_zeros(out)
    half = z.dtype != torch.float32
    depth = block(g.g_wide, 64)
    rows = (256 if half else 64) // depth
    per_program = max(rows, triton.next_power_of_2(triton.cdiv(n, PROGRAMS)))
    tile = (
        min(64 if half else 32, max(16, triton.next_power_of_2(g.slices_wide))),
        min(64 if half else 32, max(16, triton.next_power_of_2(columns))),
    )
    tiles = (triton.cdiv(g.slices_wide, tile[0]), triton.cdiv(columns, tile[1]))
    programs = triton.cdiv(n, per_program)
    partial = z.new_empty(programs, g.slices_wide, columns, dtype=torch.float32)
    with torch.cuda.device_of(z):
        _inner_products_kernel[(programs, tiles[0], tiles[1])](
            g.wide,
            z,
            partial,
            n,
            WIDE=g.slices_wide,
            COLUMNS=columns,
            G=g.g_wide,
            WS=g.wide_s,
            WG=g.wide_g,
            PER_PROGRAM=per_program,
            BM=rows,
            BG=depth,
            BI=tile[0],
            BJ=tile[1],
            num_warps=4,
            num_stages=2,
        )
    return partial.sum(0).to(z.dtype).view(out)


@triton.jit
def _inner_products_kernel(
    wide_ptr,
    z_ptr,
    partial_ptr,
    n,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    G: tl.constexpr,
    WS: tl.constexpr,
    WG: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)
    pair = tl.arange(0, BM * BG)  # (row, g): BM rows are one product
    total = tl.zeros((BI, BJ), tl.float32)
    for row0 in range(0, PER_PROGRAM, BM):
        rows = (tl.program_id(0) * PER_PROGRAM + row0 + pair // BG).to(tl.int64)
        for g0 in range(0, G, BG):
            g = g0 + pair % BG
            live = (rows < n) & (g < G)
            at = (rows * (WIDE * G) + g * WG)[None, :] + (i * WS)[:, None]
            wide = tl.load(wide_ptr + at, mask=live[None, :] & (i < WIDE)[:, None], other=0.0)
            at = (rows * (COLUMNS * G) + g)[:, None] + (j * G)[None, :]
            z = tl.load(z_ptr + at, mask=live[:, None] & (j < COLUMNS)[None, :], other=0.0)
            total = tl.dot(wide, z, total, input_precision="ieee")
    at = partial_ptr + tl.program_id(0).to(tl.int64) * (WIDE * COLUMNS)
    mask = (i < WIDE)[:, None] & (j < COLUMNS)[None, :]
    tl.store(at + (i[:, None] * COLUMNS + j[None, :]), total, mask=mask)
