"""The one door to the arithmetic: picks the contraction order and the engine for a product.

Plain path: one product with the large matrix on contiguous rows and one with the small matrix as
a (small x small) matrix that multiplies slices, in the cheaper order; or the weight is rebuilt and
multiplied as a dense one. Measured on one core (AVX512/AMX, torch 2.13, 128 and 2,048 rows): the
first is 2.7 to 12 times as fast as `nn.Linear` in float32 for the shapes plans choose; in bfloat16,
whose dense product runs on AMX, only where it saves at least about 8 times the FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ShapeError
from .shapes import KroneckerShape, dense_flops

Terms = Tensor | Sequence[Tensor]

WORTH = {torch.float32: 1.5, torch.float64: 1.5}
"""Least FLOPs saved, as a ratio, for the factored product to beat the rebuilt one on a CPU."""

WORTH_HALF = 8.0
"""The same in bfloat16 and float16. On CUDA the factored product is always taken."""

TINY = 4
"""A matrix with a side this small must not be the inner one of a batched product on a CPU: 20 to
300 times slower than it should be, forward and backward."""


def shape_of(a: Tensor, b: Tensor) -> KroneckerShape:
    return KroneckerShape(a.shape[1], a.shape[2], b.shape[1], b.shape[2], a.shape[0])


def kron_linear(x: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """``x · (sum_r a[r] ⊗ b[r])ᵀ + bias``; defined by `kronbert.reference.kron_linear`.

    x (..., a_in * b_in); a (rank, a_out, a_in), b (rank, b_out, b_in), or sequences of groups that
    are summed; bias (a_out * b_out) -> (..., a_out * b_out). Any leading dimensions, 0 rows and
    strides. Raises `ShapeError` for sizes, dtypes or devices that do not fit."""
    groups = _groups(a, b)
    _check_input(x, groups, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        groups = [(one_a.to(dtype), one_b.to(dtype)) for one_a, one_b in groups]
        bias = bias if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor | None = None
    for one_a, one_b in groups:
        part = _product(rows, one_a, one_b)
        y = part if y is None else y + part
    assert y is not None  # _groups refuses an empty sum
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


def kron_embedding(
    ids: Tensor, a: Terms, b: Terms, padding_idx: int | None = None, sparse: bool = False
) -> Tensor:
    """Rows ``ids`` of ``sum_r a[r] ⊗ b[r]``; defined by `kronbert.reference.kron_embedding`.

    ids (...) of int; a (a_out, rank, a_in): row-major by vocabulary entry, unlike `kron_linear`'s,
    since a lookup reads all its terms at once; b (rank, b_out, b_in); or sequences of groups ->
    (..., a_in * b_in). The row ``padding_idx`` of a gets no gradient (b_out = 1)."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"kron_embedding: ids of {ids.dtype}: expected integers. Call ids.long().")
    groups = _groups(a, b)
    out: Tensor | None = None
    for one_a, one_b in groups:
        rank, b_out, b_in = one_b.shape
        if torch.is_autocast_enabled(ids.device.type):
            one_a, one_b = one_a.float(), one_b.float()
        flat = ids.reshape(-1)
        entry = flat if b_out == 1 else flat // b_out
        skip = padding_idx if b_out == 1 else None
        picked = F.embedding(entry, one_a.flatten(1), skip, sparse=sparse)
        picked = picked.view(-1, rank, one_a.shape[2])
        if b_out == 1:
            # (n, a_in, rank) · (rank, b_in): one plain product for every rank and n.
            part = (picked.transpose(1, 2).reshape(-1, rank) @ one_b[:, 0]).view(flat.shape[0], -1)
        else:
            b_rows = one_b.transpose(0, 1)[flat % b_out]
            part = torch.matmul(picked.transpose(1, 2), b_rows).reshape(flat.shape[0], -1)
        out = part if out is None else out + part
    assert out is not None  # _groups refuses an empty sum
    return out.view(*ids.shape, out.shape[-1])


def kron_logits(h: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """Scores of every row of a Kronecker table: h (..., a_in * b_in) -> (..., a_out * b_out).

    a (a_out, rank, a_in) and b (rank, b_out, b_in) as `kron_embedding` stores them. The (rows,
    width) table is never rebuilt: h meets b first, so a product costs rank * a_in per row."""
    groups = _groups(a, b)
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h = h.to(dtype)
        groups = [(one_a.to(dtype), one_b.to(dtype)) for one_a, one_b in groups]
        bias = bias if bias is None else bias.to(dtype)
    rows = h.reshape(-1, h.shape[-1])
    y: Tensor | None = None
    for one_a, one_b in groups:
        rank, b_out, b_in = one_b.shape
        a_in = one_a.shape[2]
        # z (n, a_in, rank, b_out) = h (n, a_in, b_in) · b (rank b_out, b_in)ᵀ
        z = F.linear(rows.reshape(-1, b_in), one_b.reshape(rank * b_out, b_in))
        z = z.view(-1, a_in, rank, b_out).permute(0, 3, 2, 1).reshape(-1, rank * a_in)
        part = F.linear(z, one_a.flatten(1)).view(rows.shape[0], b_out, -1)
        part = part.transpose(1, 2).reshape(rows.shape[0], -1)
        y = part if y is None else y + part
    assert y is not None  # _groups refuses an empty sum
    if bias is not None:
        y = y + bias
    return y.view(*h.shape[:-1], y.shape[-1])


def rebuild_weight(a: Terms, b: Terms) -> Tensor:
    """``sum_r a[r] ⊗ b[r]`` over all groups: (a_out * b_out, a_in * b_in), without a slow einsum."""
    weight: Tensor | None = None
    for one_a, one_b in _groups(a, b):
        rank, a_out, a_in = one_a.shape
        _, b_out, b_in = one_b.shape
        if rank == 1:
            blocks = one_a[0][:, None, :, None] * one_b[0][None, :, None, :]
        else:
            blocks = (one_a.reshape(rank, -1).T @ one_b.reshape(rank, -1)).view(
                a_out, a_in, b_out, b_in
            )
            blocks = blocks.transpose(1, 2)
        part = blocks.reshape(a_out * b_out, a_in * b_in)
        weight = part if weight is None else weight + part
    assert weight is not None  # _groups refuses an empty sum
    return weight


def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, in): the engine and the order."""
    shape = shape_of(a, b)
    if shape.low_rank:
        return F.linear(F.linear(x, b[:, 0]), a[:, :, 0].T)
    if x.device.type == "cpu":
        saved = dense_flops(shape.out_features, shape.in_features) / shape.flops()
        if saved < WORTH.get(x.dtype, WORTH_HALF):
            return F.linear(x, rebuild_weight(a, b))
    return factored_product(x, a, b)


def factored_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, a_in * b_in) without the weight: (n, a_out * b_out).

    The product needs its large matrix on contiguous rows, which is ``b``'s place. A large ``a``
    beside a tiny ``b`` (the papers' attention) is therefore turned round: b ⊗ a is a ⊗ b with rows
    and columns shuffled, so x and y are transposed within each row."""
    n = x.shape[0]
    _, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    turned = min(b_out, b_in) <= TINY and a_out * a_in > b_out * b_in
    if turned:
        x = x.view(n, a_in, b_in).transpose(1, 2).reshape(n, -1)
        y = _small_large(x, b, a)
        return y.view(n, b_out, a_out).transpose(1, 2).reshape(n, -1)
    return _small_large(x, a, b)


def _small_large(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    n = x.shape[0]
    rank, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    if shape_of(a, b).order == "b":
        z = F.linear(x.reshape(n * a_in, b_in), b.reshape(rank * b_out, b_in))
        mix = a.permute(1, 2, 0).reshape(a_out, a_in * rank)
        return torch.matmul(mix, z.view(n, a_in * rank, b_out)).reshape(n, a_out * b_out)
    mix = a.permute(1, 0, 2).reshape(a_out * rank, a_in)
    z = torch.matmul(mix, x.view(n, a_in, b_in)).reshape(n * a_out, rank * b_in)
    return F.linear(z, b.permute(1, 0, 2).reshape(b_out, rank * b_in)).view(n, a_out * b_out)


def _groups(a: Terms, b: Terms) -> list[tuple[Tensor, Tensor]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [(a, b)]
    if isinstance(a, Tensor) or isinstance(b, Tensor) or len(a) != len(b) or not a:
        raise ShapeError(
            "kron: expected a and b as two tensors, or as two sequences of as many groups."
        )
    return list(zip(a, b, strict=True))


def _check_input(x: Tensor, groups: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
    a, b = groups[0]
    width = a.shape[2] * b.shape[2]
    if x.dim() == 0 or x.shape[-1] != width:
        raise ShapeError(
            f"kron_linear: x {tuple(x.shape)}: expected a last dimension of a_in * b_in = "
            f"{a.shape[2]} * {b.shape[2]} = {width}. Check which layer x comes from."
        )
    if not x.is_floating_point():
        raise ShapeError(f"kron_linear: x of {x.dtype}: expected a float. Call x.float().")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("a", a), ("b", b), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not autocast:
            raise ShapeError(
                f"kron_linear: x is {x.dtype}, {name} is {tensor.dtype}. "
                f"Cast one of them: x.to({tensor.dtype}) or module.to({x.dtype})."
            )
        if tensor.device != x.device:
            raise ShapeError(
                f"kron_linear: x is on {x.device}, {name} on {tensor.device}. Move one of them."
            )
