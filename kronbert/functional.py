"""The one door to the arithmetic: picks the contraction order and the engine for a product.

Plain path: one product with the large matrix on contiguous rows and one with the small matrix, in
the cheaper order; or the weight is rebuilt and multiplied as a dense one. Measured on one core of a
2-core Xeon (AVX512/AMX, torch 2.13, 768 to 3,072 wide, 128 and 2,048 rows), as times the speed of
`nn.Linear`, forward: float32 1.4 to 6 for the shapes plans and presets choose; bfloat16, whose
dense product runs on AMX, 0.7 to 1.8 (K8's 384x384 ⊗ 2x2: 0.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ShapeError
from .shapes import KroneckerShape, dense_flops

Terms = Tensor | Sequence[Tensor]
Pairs = list[tuple[Tensor, Tensor]]

WORTH = {torch.float32: 1.5, torch.float64: 1.5}
"""Least FLOPs saved, as a ratio, for the factored product to beat the rebuilt one on a CPU."""

WORTH_HALF = 2.5
"""The same in bfloat16 and float16. At 2.9 to 15 times fewer FLOPs the factored product was 1.1 to
11 times as fast as the rebuilt one in bfloat16, at 2.0 either won, at 1.9 it was 2 to 20 times
slower. On CUDA the factored product is always taken."""

TINY = 4
"""A matrix with a side this small must not be the inner one of a batched product on a CPU: 20 to
300 times slower than it should be, forward and backward."""


def shape_of(a: Tensor, b: Tensor) -> KroneckerShape:
    """The shape of a (rank, a_out, a_in) and b (rank, b_out, b_in)."""
    return KroneckerShape(a.shape[1], a.shape[2], b.shape[1], b.shape[2], a.shape[0])


def kron_linear(x: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """``x · (sum_r a[r] ⊗ b[r])ᵀ + bias``; defined by `kronbert.reference.kron_linear`.

    x (..., a_in * b_in); a (rank, a_out, a_in), b (rank, b_out, b_in), or sequences of groups that
    are summed; bias (a_out * b_out) -> (..., a_out * b_out). Any leading dimensions, 0 rows and
    strides. Raises `ShapeError` for sizes, dtypes or devices that do not fit."""
    groups = _pairs("kron_linear", a, b)
    x, groups, bias = _autocast(x, groups, bias)
    out = _check_input("kron_linear", x, groups, bias, [shape_of(*pair) for pair in groups])
    rows = x.reshape(-1, x.shape[-1])
    y = _sum(_product(rows, one_a, one_b) for one_a, one_b in groups)
    return (y if bias is None else y + bias).view(*x.shape[:-1], out)


def kron_embedding(ids: Tensor, a: Terms, b: Terms, padding_idx: int | None = None) -> Tensor:
    """Rows ``ids`` of ``sum_r a[r] ⊗ b[r]``; defined by `kronbert.reference.kron_embedding`.

    ids (...) of int; a (a_out, rank, a_in): row-major by vocabulary entry, unlike `kron_linear`'s,
    since a lookup reads all its terms at once; b (rank, b_out, b_in); or sequences of groups ->
    (..., a_in * b_in). Lookups of ``padding_idx`` give no gradient, to a or b. Raises `ShapeError`
    for ids that are no integers or matrices that do not fit, IndexError (on a CPU) for an id
    outside the table."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"kron_embedding: ids of {ids.dtype}: expected integers. Call ids.long().")
    groups = _pairs("kron_embedding", a, b, table=True)
    flat = ids.reshape(-1)  # autocast casts the rows that are read, never the table
    y = _sum(_rows(flat, one_a, one_b) for one_a, one_b in groups)
    if padding_idx is not None and torch.is_grad_enabled():
        if padding_idx < 0:
            padding_idx += groups[0][0].shape[0] * groups[0][1].shape[1]
        y = torch.where((flat == padding_idx)[:, None], y.detach(), y)
    return y.view(*ids.shape, y.shape[-1])


def kron_logits(h: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """Scores of every row of a Kronecker table: h (..., a_in * b_in) -> (..., a_out * b_out).

    a (a_out, rank, a_in) and b (rank, b_out, b_in) as `kron_embedding` stores them. The (rows,
    width) table is never rebuilt: h meets b first, so a product costs rank * a_in per row. Raises
    `ShapeError` as `kron_linear` does."""
    groups = _pairs("kron_logits", a, b, table=True)
    h, groups, bias = _autocast(h, groups, bias)
    shapes = [shape_of(one_a.transpose(0, 1), one_b) for one_a, one_b in groups]
    out = _check_input("kron_logits", h, groups, bias, shapes)
    rows = h.reshape(-1, h.shape[-1])
    y = _sum(_b_first(rows, one_a, one_b) for one_a, one_b in groups)
    return (y if bias is None else y + bias).view(*h.shape[:-1], out)


def rebuild_weight(a: Terms, b: Terms) -> Tensor:
    """``sum_r a[r] ⊗ b[r]`` over all groups: (a_out * b_out, a_in * b_in); no slow einsum."""
    return _sum(_weight(one_a, one_b) for one_a, one_b in _pairs("rebuild_weight", a, b))


def factored_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, a_in * b_in) without the weight: (n, a_out * b_out).

    A large ``b`` meets contiguous rows and ``a`` mixes slices. A large ``a`` beside a tiny ``b``
    (the papers' attention) has its rows transposed in between instead, so that every product is a
    plain one: 1.5 to 1.8 times as fast as shuffling x and y around the first form."""
    if min(b.shape[1:]) > TINY or a[0].numel() <= b[0].numel():
        return _mix_slices(x, a, b)
    if shape_of(a, b).order == "b":
        return _b_first(x, a.transpose(0, 1), b)
    return _a_first(x, a, b)


def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, in): the engine and the order."""
    shape = shape_of(a, b)
    if shape.low_rank:
        return F.linear(F.linear(x, b[:, 0]), a[:, :, 0].T)
    if x.device.type == "cpu":
        saved = dense_flops(shape.out_features, shape.in_features) / shape.flops()
        if saved < WORTH.get(x.dtype, WORTH_HALF):
            return F.linear(x, _weight(a, b))
    return factored_product(x, a, b)


def _mix_slices(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``b`` on contiguous rows, ``a`` as a small matrix over slices, in the cheaper order."""
    n = x.shape[0]
    rank, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    if shape_of(a, b).order == "b":
        z = F.linear(x.reshape(n * a_in, b_in), b.reshape(rank * b_out, b_in))
        mix = a.permute(1, 2, 0).reshape(a_out, a_in * rank)
        return torch.matmul(mix, z.view(n, a_in * rank, b_out)).view(n, a_out * b_out)
    mix = a.permute(1, 0, 2).reshape(a_out * rank, a_in)
    z = torch.matmul(mix, x.view(n, a_in, b_in)).view(n * a_out, rank * b_in)
    return F.linear(z, b.permute(1, 0, 2).reshape(b_out, rank * b_in)).view(n, a_out * b_out)


def _b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a (a_out, rank, a_in) on what b makes of x; two plain products, a transpose after each."""
    n = x.shape[0]
    a_out, rank, a_in = a.shape
    _, b_out, b_in = b.shape
    z = F.linear(x.reshape(n * a_in, b_in), b.reshape(rank * b_out, b_in))
    z = z.view(n, a_in, rank, b_out).permute(0, 3, 2, 1).reshape(n * b_out, rank * a_in)
    y = F.linear(z, a.reshape(a_out, rank * a_in))
    return y.view(n, b_out, a_out).transpose(1, 2).reshape(n, a_out * b_out)


def _a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """b on what a (rank, a_out, a_in) makes of x; two plain products, a transpose before each."""
    n = x.shape[0]
    rank, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    x = x.view(n, a_in, b_in).transpose(1, 2).reshape(n * b_in, a_in)
    z = F.linear(x, a.reshape(rank * a_out, a_in)).view(n, b_in, rank, a_out)
    z = z.permute(0, 3, 2, 1).reshape(n * a_out, rank * b_in)
    return F.linear(z, b.transpose(0, 1).reshape(b_out, rank * b_in)).view(n, a_out * b_out)


def _rows(flat: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group's rows ``flat`` (n,): (n, a_in * b_in); a (a_out, rank, a_in)."""
    n = flat.shape[0]
    _, rank, a_in = a.shape
    _, b_out, b_in = b.shape
    entry = flat if b_out == 1 else flat.div(b_out, rounding_mode="floor")
    table = a.reshape(a.shape[0], rank * a_in)
    picked = F.embedding(entry, table).view(n, rank, a_in).transpose(1, 2)
    if b_out == 1:
        # (n a_in, rank) · (rank, b_in): one plain product for every rank and b_in.
        return (picked.reshape(n * a_in, rank) @ b[:, 0]).view(n, a_in * b_in)
    b_rows = b.transpose(0, 1)[flat % b_out]
    return torch.matmul(picked, b_rows).view(n, a_in * b_in)


def _weight(a: Tensor, b: Tensor) -> Tensor:
    rank, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    if rank == 1:
        blocks = a[0][:, None, :, None] * b[0][None, :, None, :]
    else:
        blocks = a.reshape(rank, a_out * a_in).T @ b.reshape(rank, b_out * b_in)
        blocks = blocks.view(a_out, a_in, b_out, b_in).transpose(1, 2)
    return blocks.reshape(a_out * b_out, a_in * b_in)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor; of one, itself."""
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _autocast(x: Tensor, groups: Pairs, bias: Tensor | None) -> tuple[Tensor, Pairs, Tensor | None]:
    """Cast as autocast casts the operands of a product: every float except float64."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x, groups, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        keep = tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if keep else tensor.to(dtype)

    pairs = [(cast(a), cast(b)) for a, b in groups]
    return cast(x), pairs, None if bias is None else cast(bias)


def _pairs(where: str, a: Terms, b: Terms, *, table: bool = False) -> Pairs:
    """(a, b) of each group, all of one weight size; table: a is (a_out, rank, a_in)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        pairs = [(a, b)]
    elif isinstance(a, Tensor) or isinstance(b, Tensor) or len(a) != len(b) or not len(a):
        raise ShapeError(
            f"{where}: expected a and b as two tensors, or as two sequences of as many groups."
        )
    else:
        pairs = list(zip(a, b, strict=True))
    sizes = []
    rank, rows = (1, 0) if table else (0, 1)
    for one_a, one_b in pairs:
        if one_a.dim() != 3 or one_b.dim() != 3 or one_a.shape[rank] != one_b.shape[0]:
            order = "(a_out, rank, a_in)" if table else "(rank, a_out, a_in)"
            raise ShapeError(
                f"{where}: a {tuple(one_a.shape)}, b {tuple(one_b.shape)}: expected a {order} and "
                "b (rank, b_out, b_in) with the same rank. One term needs rank 1: unsqueeze it."
            )
        sizes.append((one_a.shape[rows] * one_b.shape[1], one_a.shape[2] * one_b.shape[2]))
    if any(size != sizes[0] for size in sizes):
        raise ShapeError(
            f"{where}: the groups make weights of {' and '.join(f'{o}x{i}' for o, i in sizes)}: "
            "expected one size. Sum only groups of the same layer."
        )
    return pairs


def _check_input(
    where: str, x: Tensor, groups: Pairs, bias: Tensor | None, shapes: list[KroneckerShape]
) -> int:
    """out_features; `ShapeError` unless x, the matrices and the bias go together."""
    shape = shapes[0]
    if x.dim() == 0 or x.shape[-1] != shape.in_features:
        raise ShapeError(
            f"{where}: input {tuple(x.shape)}: expected a last dimension of a_in * b_in = "
            f"{shape.a_in} * {shape.b_in} = {shape.in_features}. Check which layer it comes from."
        )
    if not x.is_floating_point():
        raise ShapeError(f"{where}: input of {x.dtype}: expected a float. Call .float() on it.")
    if bias is not None and bias.shape != (shape.out_features,):
        raise ShapeError(
            f"{where}: bias {tuple(bias.shape)}: expected ({shape.out_features},), one number per "
            "output. Check which layer it comes from."
        )
    named = [pair for a, b in groups for pair in (("a", a), ("b", b))]
    for name, tensor in named if bias is None else [*named, ("bias", bias)]:
        if tensor.dtype != x.dtype:
            raise ShapeError(
                f"{where}: the input is {x.dtype}, {name} is {tensor.dtype}. "
                f"Cast one of them: input.to({tensor.dtype}) or module.to({x.dtype})."
            )
        if tensor.device != x.device:
            raise ShapeError(
                f"{where}: the input is on {x.device}, {name} on {tensor.device}. Move one of them."
            )
    return shape.out_features
