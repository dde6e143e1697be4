"""The one door to the arithmetic: checks the operands and picks what runs a product.

On CUDA the Triton kernels (`kronbert.op_linear`); on a CPU, in eager mode, the engine that picks a
form by measured cost (`kronbert.cpu`); everywhere else (compiling, exporting, other dtypes and
devices) plain PyTorch, in a form that follows from the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, cuda
from .errors import ShapeError
from .forms import DENSE, LOW_RANK, Form, prepare, run
from .forms import weight as _weight
from .shapes import Groups, KroneckerShape, dense_flops

Terms = Tensor | Sequence[Tensor]
Pairs = list[tuple[Tensor, Tensor]]

WORTH = {torch.float32: 1.5, torch.float64: 1.5}
"""Least FLOPs saved, as a ratio, for the factored product to beat the rebuilt one on a CPU, where
the number of rows is not known."""

WORTH_HALF = 2.5
"""The same in bfloat16 and float16. At 2.9 to 15 times fewer FLOPs the factored product was 1.1 to
11 times as fast as the rebuilt one in bfloat16, at 2.0 either won, at 1.9 it was 2 to 20 times
slower. On CUDA the factored product is always taken."""

TINY = 4
"""A matrix with a side this small must not be the inner one of a batched product on a CPU: 20 to
300 times slower than it should be, forward and backward."""


def shape_of(a: Tensor, b: Tensor) -> KroneckerShape:
    """The shape of a (rank, a_out, a_in) and b (rank, b_out, b_in)."""
    sizes = (*a.shape[1:], *b.shape[1:], a.shape[0])
    return KroneckerShape(*(int(size) for size in sizes))  # tensors, while torch.jit traces


def kron_linear(x: Tensor, a: Terms, b: Terms, bias: Tensor | None = None) -> Tensor:
    """``x · (sum_r a[r] ⊗ b[r])ᵀ + bias``; defined by `kronbert.reference.kron_linear`.

    x (..., a_in * b_in); a (rank, a_out, a_in), b (rank, b_out, b_in), or sequences of groups that
    are summed; bias (a_out * b_out) -> (..., a_out * b_out). Any leading dimensions, 0 rows and
    strides. Raises `ShapeError` for sizes, dtypes or devices that do not fit."""
    if not torch.compiler.is_compiling():
        known = cpu.recall(x, _listed(a), _listed(b), bias)
        if known is not None:
            return known
    x, groups, shapes, bias = checked("kron_linear", x, a, b, bias)
    if cuda.takes(x):
        return cuda.linear(x, groups, bias)
    if cpu.takes(x, groups):
        return cpu.linear(x, groups, shapes, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _sum(_product(rows, one_a, one_b) for one_a, one_b in groups)
    return (y if bias is None else y + bias).view(*x.shape[:-1], shapes[0].out_features)


def kron_embedding(
    ids: Tensor,
    a: Terms,
    b: Terms,
    padding_idx: int | None = None,
    *,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """Rows ``ids`` of ``sum_r a[r] ⊗ b[r]``; defined by `kronbert.reference.kron_embedding`.

    ids (...) of int; a (a_out, rank, a_in): row-major by vocabulary entry, unlike `kron_linear`'s,
    since a lookup reads all its terms at once; b (rank, b_out, b_in); or sequences of groups ->
    (..., a_in * b_in). starts: the first row of each group; those after the first may make a block
    of rows only. Lookups of ``padding_idx`` give no gradient, to a or b. Raises `ShapeError`
    for ids that are no integers or matrices that do not fit, IndexError (on a CPU) for an id
    outside the table."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"kron_embedding: ids of {ids.dtype}: expected integers. Call ids.long().")
    groups, starts = _table("kron_embedding", a, b, starts)
    flat = ids.reshape(-1)
    device = flat.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # which leaves nn.Embedding's rows alone, too
            y = _all_rows(flat, groups, starts)
    else:
        y = _all_rows(flat, groups, starts)
    # A trace holds for both modes, and jit.trace's check makes its second one without gradients.
    if padding_idx is not None and (torch.is_grad_enabled() or torch.jit.is_tracing()):
        if padding_idx < 0:
            padding_idx += _entries(groups[0])
        y = torch.where((flat == padding_idx)[:, None], y.detach(), y)
    return y.view(*ids.shape, y.shape[-1])


def kron_logits(
    h: Tensor,
    a: Terms,
    b: Terms,
    bias: Tensor | None = None,
    *,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """Scores of every row of a Kronecker table: h (..., a_in * b_in) -> (..., a_out * b_out).

    a, b and starts as `kron_embedding` takes them. The (rows, width) table is never rebuilt: h
    meets b first, so a product costs rank * a_in per row. Raises `ShapeError` as `kron_linear`
    does."""
    groups, starts = _table("kron_logits", a, b, starts)
    h, groups, bias = _autocast(h, groups, bias)
    shapes = [shape_of(one_a.transpose(0, 1), one_b) for one_a, one_b in groups]
    out = _check_input("kron_logits", h, groups, bias, shapes)
    rows = h.reshape(-1, h.shape[-1])
    y = _scores(rows, *groups[0])
    for pair, start in zip(groups[1:], starts[1:], strict=True):
        part, after = _scores(rows, *pair), out - start - _entries(pair)
        if not (start or after):
            y = y + part
        elif cpu.takes(y, [pair]):  # the other columns are not touched
            y.narrow(1, start, out - start - after).add_(part)
        else:
            y = y + F.pad(part, (start, after))
    return (y if bias is None else y + bias).view(*h.shape[:-1], out)


def rebuild_weight(a: Terms, b: Terms) -> Tensor:
    """``sum_r a[r] ⊗ b[r]`` over all groups: (a_out * b_out, a_in * b_in); no slow einsum."""
    return _sum(_weight(one_a, one_b) for one_a, one_b in _pairs("rebuild_weight", a, b))


def rebuild_table(a: Terms, b: Terms, starts: Sequence[int] | None = None) -> Tensor:
    """The whole table (entries, width) of a, b and starts as `kron_embedding` takes them."""
    groups, starts = _table("rebuild_table", a, b, starts)
    weight = _weight(groups[0][0].transpose(0, 1), groups[0][1])
    for (one_a, one_b), start in zip(groups[1:], starts[1:], strict=True):
        part = _weight(one_a.transpose(0, 1), one_b)
        after = weight.shape[0] - start - part.shape[0]
        weight = weight + (F.pad(part, (0, 0, start, after)) if start or after else part)
    return weight


def checked(
    where: str, x: Tensor, a: Terms, b: Terms, bias: Tensor | None
) -> tuple[Tensor, Pairs, Groups, Tensor | None]:
    """What a product needs, cast as autocast asks: x, the groups' (a, b), their shapes, bias.

    Raises `ShapeError`, naming ``where``, for sizes, dtypes or devices that do not fit."""
    groups = _pairs(where, a, b)
    x, groups, bias = _autocast(x, groups, bias)
    shapes = tuple(shape_of(*pair) for pair in groups)
    _check_input(where, x, groups, bias, shapes)
    return x, groups, shapes, bias


def factored_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, a_in * b_in) without the weight: (n, a_out * b_out).

    A large ``b`` meets contiguous rows and ``a`` mixes slices. A large ``a`` beside a tiny ``b``
    (the papers' attention) has its rows transposed in between instead, so that every product is a
    plain one: 1.5 to 1.8 times as fast as shuffling x and y around the first form."""
    shape = shape_of(a, b)
    return run(_factored_form(shape), shape, x, prepare(_factored_form(shape), a, b))


def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group on x (n, in): the form that follows from the sizes."""
    shape = shape_of(a, b)
    if not shape.low_rank and x.device.type == "cpu":
        saved = dense_flops(shape.out_features, shape.in_features) / shape.flops()
        if saved < WORTH.get(x.dtype, WORTH_HALF):
            return run(DENSE, shape, x, prepare(DENSE, a, b))
    return factored_product(x, a, b)


def _factored_form(shape: KroneckerShape) -> Form:
    if shape.low_rank:
        return LOW_RANK
    large_a = shape.a_out * shape.a_in > shape.b_out * shape.b_in
    other = "turn" if large_a and min(shape.b_out, shape.b_in) <= TINY else "mix"
    return Form("b", "rows", other) if shape.order == "b" else Form("a", other, "rows")


def _scores(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One group of a table, a (a_out, rank, a_in), on h (n, in): (n, a_out * b_out)."""
    shape = shape_of(a.transpose(0, 1), b)
    n, a_out = h.shape[0], shape.a_out
    z = F.linear(h.reshape(n * shape.a_in, shape.b_in), b.reshape(-1, shape.b_in))
    z = z.view(n, shape.a_in, shape.rank, shape.b_out).permute(0, 3, 2, 1)
    inner = shape.rank * shape.a_in
    # a as it lies: a copy of a table costs more than the product.
    y = F.linear(z.reshape(n * shape.b_out, inner), a.reshape(a_out, inner))
    return y.view(n, shape.b_out, a_out).transpose(1, 2).reshape(n, shape.out_features)


def _all_rows(flat: Tensor, groups: Pairs, starts: Sequence[int]) -> Tensor:
    y = _rows(flat, *groups[0])
    for pair, start in zip(groups[1:], starts[1:], strict=True):
        y = _add_rows(y, flat, pair, start, entries=_entries(groups[0]))
    return y


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


def _add_rows(
    y: Tensor, flat: Tensor, pair: tuple[Tensor, Tensor], start: int, *, entries: int
) -> Tensor:
    """y (n, width), which may be written over, plus the rows ``flat`` (n,) of a group that makes
    rows from ``start`` on."""
    rows = _entries(pair)
    if rows == entries:
        return y + _rows(flat, *pair)
    inside = (flat >= start) & (flat < start + rows)
    if cpu.takes(y, [pair]):  # only the rows that it makes
        chosen = inside.nonzero()[:, 0]
        return y.index_add_(0, chosen, _rows(flat[chosen] - start, *pair))
    found = _rows((flat - start).clamp(0, rows - 1), *pair)
    return y + torch.where(inside[:, None], found, found.new_zeros(()))


def _entries(pair: tuple[Tensor, Tensor]) -> int:
    """Rows that a group of a table makes; a (a_out, rank, a_in)."""
    return pair[0].shape[0] * pair[1].shape[1]


def _listed(terms: Terms) -> Sequence[Tensor]:
    return [terms] if isinstance(terms, Tensor) else terms


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


def _table(
    where: str, a: Terms, b: Terms, starts: Sequence[int] | None
) -> tuple[Pairs, Sequence[int]]:
    """(a, b) of each group of a table, a (a_out, rank, a_in), and the first row of each."""
    groups = _pairs(where, a, b, table=True, blocks=starts is not None)
    if starts is None:
        return groups, [0] * len(groups)
    rows = [_entries(pair) for pair in groups]
    ends = [start + count for start, count in zip(starts, rows, strict=False)]
    if len(starts) != len(groups) or starts[0] or min(starts) < 0 or max(ends) > rows[0]:
        raise ShapeError(
            f"{where}: groups of {rows} rows from {list(starts)} on: expected one start per group, "
            "0 for the first, which makes the whole table, and blocks that lie within it."
        )
    return groups, starts


def _pairs(where: str, a: Terms, b: Terms, *, table: bool = False, blocks: bool = False) -> Pairs:
    """(a, b) of each group, all of one weight size; table: a is (a_out, rank, a_in); blocks: groups
    may make fewer rows than the first."""
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
    first = sizes[0]
    if any(size[1] != first[1] or (size[0] != first[0] and not blocks) for size in sizes):
        raise ShapeError(
            f"{where}: the groups make weights of {' and '.join(f'{o}x{i}' for o, i in sizes)}: "
            "expected one size. Sum only groups of the same layer."
        )
    return pairs


def _check_input(
    where: str, x: Tensor, groups: Pairs, bias: Tensor | None, shapes: Sequence[KroneckerShape]
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
