"""``LN(x + dropout(contract(gelu(expand(x) + bias1)) + bias2))``: no hidden layer in memory.

expand = a1 ⊗ b1 and contract = a2 ⊗ b2 with small a1 and a2 and one hidden slicing, h_out slices of
c: the papers' a1 16x2, b1 192x384, a2 2x16, b2 384x192. Three phases: z = x · b1ᵀ, a plain matrix
product; u = a2 · gelu(a1 · z + bias1) in registers (`kronbert.kernels.ffn_hidden`); the products
with b2 and the LayerNorm. Or all of them in one kernel that keeps z and u on chip as well.

Kept for backward besides x: z and the normalised sum. In half precision, 768 wide, h_in = 2: 768
(K21) or 1,536 (K8) + 1,536 bytes a token, and 8 of statistics; the hidden layer before and after
its activation would be 12,288.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from ..shapes import KroneckerShape
from . import ffn_hidden, linear_norm, norm
from .gelu import require_activation
from .norm_tile import (
    WIDEST,
    check_norm,
    dropout,
    new_normed,
    norm_tile,
    require_dtype,
    require_rows,
    require_size,
)

Path = Literal["whole", "phases"]

# (expand, contract) -> path, where both can run; phases for what is not listed. Chosen by counting
# bytes and tensor-core work, not timed: K21's b1 and b2 take 295 KB, which every program of the
# whole kernel reads; K8's take twice that, and twice the products per row.
PATHS: dict[tuple[str, str], Path] = {
    ("16x2*192x384", "2x16*384x192"): "whole",
    ("16x2*96x192", "2x16*192x96"): "whole",
    ("8x2*384x384", "2x8*384x384"): "phases",
    ("8x2*192x192", "2x8*192x192"): "phases",
}

SLOTS = 8
"""rank * a_in of expand and rank * a_out of contract, fp32 tiles held at once, are at most this."""


class FFN(NamedTuple):
    """y (n, width); kept for backward, or None: z (n, h_in, rank1, c), total (n, width), mean and
    rstd (n,)."""

    y: Tensor
    z: Tensor | None
    total: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


class FFNGradients(NamedTuple):
    """Each shaped as what it belongs to; None for a bias that was not given."""

    dx: Tensor
    da1: Tensor
    db1: Tensor
    dbias1: Tensor | None
    da2: Tensor
    db2: Tensor
    dbias2: Tensor | None
    dweight: Tensor
    dbias: Tensor | None


def fits(expand: KroneckerShape, contract: KroneckerShape) -> bool:
    """Whether `ffn_norm` runs this pair; decided by sizes alone."""
    same = (expand.a_out, expand.b_out) == (contract.a_in, contract.b_in)
    slots = max(expand.rank * expand.a_in, contract.rank * contract.a_out)
    orders = (expand.order, contract.order) == ("b", "a")
    square = expand.in_features == contract.out_features <= WIDEST
    return same and orders and square and slots <= SLOTS and expand.a_out <= 64


def fits_whole(expand: KroneckerShape, contract: KroneckerShape, dtype: torch.dtype) -> bool:
    """Whether one kernel holds the pair: half precision, one term each, rows of at most 768."""
    if not fits(expand, contract) or dtype == torch.float32:
        return False
    widest = expand.in_features <= 768 and expand.a_in <= 2 and contract.a_out <= 2
    blocks = all(size % 32 == 0 for size in (expand.b_out, expand.b_in, contract.b_out))
    return expand.rank == contract.rank == 1 and widest and blocks


def path_of(expand: KroneckerShape, contract: KroneckerShape, dtype: torch.dtype) -> Path:
    """The path `PATHS` names, if the pair fits it."""
    named = PATHS.get((expand.spec, contract.spec), "phases")
    return "whole" if named == "whole" and fits_whole(expand, contract, dtype) else "phases"


@triton.jit
def _whole_kernel(
    x,
    a1,
    b1,
    bias1,
    a2,
    b2,
    bias2,
    weight,
    bias,
    y,
    z,
    total,
    mean,
    rstd,
    seed,
    n,
    threshold,
    scale,
    eps,
    H_OUT: tl.constexpr,
    H_IN: tl.constexpr,
    C: tl.constexpr,
    K1: tl.constexpr,
    O_OUT: tl.constexpr,
    K2: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """HIDDEN columns of every hidden slice at a time: z there, u there, their share of the sums."""
    CHUNKS: tl.constexpr = K2 // COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (rows < n)[:, None]
    wide = rows.to(tl.int64)[:, None]
    half = x.dtype.element_ty
    sums = ()
    for _ in tl.static_range(O_OUT * CHUNKS):
        sums += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for c0 in range(0, C, HIDDEN):
        cols = c0 + tl.arange(0, HIDDEN)
        zs = ()
        for _ in tl.static_range(H_IN):
            zs += (tl.zeros((ROWS, HIDDEN), tl.float32),)
        for k0 in range(0, K1, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            tile = tl.load(b1 + cols[None, :] * K1 + k[:, None])
            added = ()
            for j in tl.static_range(H_IN):
                at = x + wide * (H_IN * K1) + j * K1 + k[None, :]
                part = tl.load(at, mask=live, other=0)
                added += (tl.dot(part, tile, zs[j], input_precision="ieee"),)
            zs = added
        rounded = ()
        for j in tl.static_range(H_IN):
            # As backward will read it, kept or not.
            stored = zs[j].to(half)
            if z is not None:
                tl.store(z + wide * (H_IN * C) + j * C + cols[None, :], stored, mask=live)
            rounded += (stored.to(tl.float32),)
        us = ffn_hidden.mixed_hidden(rounded, a1, bias1, a2, cols, H_OUT, H_IN, 1, C, O_OUT, 1, ACT)
        added = ()
        for i in tl.static_range(O_OUT):
            for chunk in tl.static_range(CHUNKS):
                g = chunk * COLUMNS + tl.arange(0, COLUMNS)
                tile = tl.load(b2 + g[None, :] * C + cols[:, None])
                share = sums[i * CHUNKS + chunk]
                added += (tl.dot(us[i].to(half), tile, share, input_precision="ieee"),)
        sums = added
    norm_tile(
        sums,
        rows,
        n,
        bias2,
        x,
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
        O_OUT * K2,
        O_OUT * CHUNKS,
        COLUMNS,
    )


def ffn_norm(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    activation: str = "gelu",
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
    path: Path | None = None,
) -> FFN:
    """The feed-forward half of a BERT layer: x (n, h_in * k1) -> y (n, width), width = h_in * k1.

    a1 (rank1, h_out, h_in), b1 (rank1, c, k1), bias1 (h_out * c); a2 (rank2, o_out, h_out),
    b2 (rank2, k2, c), bias2, weight, bias (width). p, seed, keep: as `norm.residual_norm` takes
    them. path None: by `path_of`. Defined by `kronbert.reference.kron_linear` and
    `torch.nn.functional.gelu` and `layer_norm`. Raises `ShapeError` for a pair that does not fit.
    """
    expand, contract = _shapes(a1, b1, a2, b2)
    if not fits(expand, contract):
        raise ShapeError(
            f"ffn_norm: {expand} and {contract} do not share small a matrices over one hidden "
            "slicing. Use linear() with its activation, then linear_norm()."
        )
    check_norm("ffn_norm", x, x, weight, bias)
    require_size("ffn_norm", (expand.out_features,), bias1=bias1)
    require_size("ffn_norm", (x.shape[1],), bias2=bias2)
    require_rows("ffn_norm", x=x, a1=a1, b1=b1, bias1=bias1, a2=a2, b2=b2, bias2=bias2, seed=seed)
    require_dtype("ffn_norm", x=x, a1=a1, b1=b1, a2=a2, b2=b2)
    path = path or path_of(expand, contract, x.dtype)
    if path == "phases":
        return _phases(
            x, a1, b1, bias1, a2, b2, bias2, weight, bias, eps, activation, p, seed, keep
        )
    if not fits_whole(expand, contract, x.dtype):
        raise ShapeError(
            f"ffn_norm: {expand} and {contract} in {x.dtype} do not fit one kernel: path='phases'."
        )
    drop = dropout("ffn_norm", p, seed)
    n = x.shape[0]
    out = new_normed(x, x.shape[1], keep)
    z = x.new_empty(n, expand.a_in, 1, expand.b_out) if keep else None
    if n > 0:
        with torch.cuda.device_of(x):
            # 32 rows and 8 warps: chosen by registers and spills at compile time, not timed.
            _whole_kernel[(triton.cdiv(n, 32),)](
                x,
                a1,
                b1,
                bias1,
                a2,
                b2,
                bias2,
                weight,
                bias,
                out.y,
                z,
                out.total,
                out.mean,
                out.rstd,
                drop.seed,
                n,
                drop.threshold,
                drop.scale,
                eps,
                H_OUT=expand.a_out,
                H_IN=expand.a_in,
                C=expand.b_out,
                K1=expand.b_in,
                O_OUT=contract.a_out,
                K2=contract.b_out,
                ACT=require_activation("ffn_norm", activation),
                ROWS=32,
                HIDDEN=_power(expand.b_out, 64),
                COLUMNS=_power(contract.b_out, 128),
                DEPTH=_power(expand.b_in, 64),
                num_warps=8,
                num_stages=2,
            )
    return FFN(out.y, z, out.total, out.mean, out.rstd)


def ffn_norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    weight: Tensor,
    *,
    activation: str = "gelu",
    p: float = 0.0,
    seed: Tensor | None = None,
    has_bias2: bool = True,
    has_bias: bool = True,
) -> FFNGradients:
    """Gradients of `ffn_norm`, whichever path ran; dy, x (n, width), the others as it kept them.

    The hidden layer is made again from z. The products with b1 and b2 are torch's."""
    n, h_in, rank1, c = z.shape
    rank2, o_out, _ = a2.shape
    k1, k2 = b1.shape[2], b2.shape[1]
    ended = norm.residual_norm_backward(
        dy, total, mean, rstd, weight, p=p, seed=seed, has_bias=has_bias, has_shift=has_bias2
    )
    dout = ended.dx.view(n * o_out, k2)
    du = (dout @ _side_by_side(b2)).view(n, o_out, rank2, c)
    mid = ffn_hidden.hidden_mix_backward(z, du, a1, bias1, a2, activation)
    db2 = dout.mT @ mid.u.view(n * o_out, rank2 * c)
    dz = mid.dz.view(n * h_in, rank1 * c)
    residual = ended.dx if ended.dtotal is None else ended.dtotal
    dx = torch.addmm(residual.view(n * h_in, k1), dz, b1.view(rank1 * c, k1))
    return FFNGradients(
        dx.view(n, h_in * k1),
        mid.da1,
        (dz.mT @ x.view(n * h_in, k1)).view(rank1, c, k1),
        mid.dbias1,
        mid.da2,
        db2.view(k2, rank2, c).transpose(0, 1).contiguous(),
        ended.dshift,
        ended.dweight,
        ended.dbias,
    )


def _phases(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> FFN:
    n = x.shape[0]
    (rank1, c, k1), h_in = b1.shape, a1.shape[2]
    rank2, o_out, _ = a2.shape
    k2 = b2.shape[1]
    z = (x.view(n * h_in, k1) @ b1.view(rank1 * c, k1).mT).view(n, h_in, rank1, c)
    u = ffn_hidden.hidden_mix(z, a1, bias1, a2, activation)
    if linear_norm.slices_plan(o_out, rank2, k2, c, x.dtype) is not None:
        out = linear_norm.slices_norm(u, b2, bias2, x, weight, bias, eps, p=p, seed=seed, keep=keep)
    else:
        product = u.view(n * o_out, rank2 * c) @ _side_by_side(b2).mT
        out = norm.residual_norm(
            product.view(n, o_out * k2),
            x,
            weight,
            bias,
            eps,
            shift=bias2,
            p=p,
            seed=seed,
            keep=keep,
        )
    return FFN(out.y, z if keep else None, out.total, out.mean, out.rstd)


def _side_by_side(b: Tensor) -> Tensor:
    """b (rank, b_out, b_in) as (b_out, rank * b_in)."""
    return b.transpose(0, 1).reshape(b.shape[1], -1)


def _shapes(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor
) -> tuple[KroneckerShape, KroneckerShape]:
    first, second = (
        KroneckerShape(a.shape[1], a.shape[2], b.shape[1], b.shape[2], a.shape[0])
        for a, b in ((a1, b1), (a2, b2))
    )
    return first, second


def _power(size: int, largest: int) -> int:
    """The largest power of two that divides ``size``, up to ``largest``."""
    return min(size & -size, largest)
