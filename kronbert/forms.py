"""The ways to run ``x · (sum_r a[r] ⊗ b[r])ᵀ`` on a CPU, each made of plain matrix products.

A product has two stages, one per matrix, in either order. The stage of the large matrix on
contiguous rows is one plain product ("rows"). The other stage has three forms:

    mix   a small matrix over slices: a batched product, with the slices as they lie
    turn  the slices are transposed, multiplied as plain rows, and transposed back
    fold  the stage as one dense matrix (a ⊗ I or I ⊗ b): more FLOPs, no copies

"dense" multiplies the weight out. Which is fastest depends on sizes, rows, dtype and machine:
`kronbert.cpu_cost` predicts it. All are differentiable, in the input and in the matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import KroneckerShape

Matrices = tuple[Tensor, ...]


CHUNK_BYTES, FEWEST_ROWS = 2**25, 64
"""Bytes that a chunk of rows holds between the stages, and its rows at least. On a 2-core Xeon
(2 MB of L2 a core, a large L3; torch 2.13) chunks that fit L2 were 0.6 to 1.0 times as fast as no
chunks, as each one pays for its calls. What this bounds is memory, and the pages that tensors of
tens of megabytes cost anew at every call: 1.4 times as fast for wide float32 maps of 4,096 rows."""


PACKED_SIDE, FEW_ROWS = 32, 4
"""A matrix with a smaller side is not packed: (2, 16) was 5 times slower so. Up to so many rows a
bias costs less inside a product than after it."""


class Form(NamedTuple):
    """order: which matrix meets the input first, "" for the dense form; then the form of its stage
    and that of the other's."""

    order: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.order}:{self.first}+{self.second}" if self.order else "dense"


DENSE = Form("", "", "")
LOW_RANK = Form("b", "rows", "rows")
"""Truncated SVD: two plain products, nothing to transpose."""

FORMS = (
    DENSE,
    Form("b", "rows", "mix"),
    Form("b", "rows", "turn"),
    Form("b", "rows", "fold"),
    Form("b", "fold", "turn"),
    Form("b", "fold", "fold"),
    Form("a", "mix", "rows"),
    Form("a", "turn", "rows"),
    Form("a", "fold", "rows"),
    Form("a", "turn", "fold"),
)


def forms_of(shape: KroneckerShape) -> tuple[Form, ...]:
    """The forms that a product of this shape can take."""
    return (DENSE, LOW_RANK) if shape.low_rank else FORMS


def weight(a: Tensor, b: Tensor) -> Tensor:
    """``sum_r a[r] ⊗ b[r]``: (out, in).

    One plain product: broadcasting is quicker forward, but 1.2 to 2.7 times slower with its
    backward, whose sums run over strides; an einsum is slower still."""
    rank, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    blocks = a.reshape(rank, a_out * a_in).T @ b.reshape(rank, b_out * b_in)
    blocks = blocks.view(a_out, a_in, b_out, b_in).transpose(1, 2)
    return blocks.reshape(a_out * b_out, a_in * b_in)


def prepare(form: Form, a: Tensor, b: Tensor) -> Matrices:
    """The matrices ``run`` multiplies with, from a (rank, a_out, a_in) and b (rank, b_out, b_in).

    Worth keeping while a and b do not change: copies of them at least, the folded or dense matrix
    at most."""
    if form == DENSE:
        return (weight(a, b),)
    if form == LOW_RANK:
        return b[:, 0].contiguous(), a[:, :, 0].T.contiguous()
    first, second = _STAGES[form]
    return first(a, b), second(a, b)


def run(
    form: Form,
    shape: KroneckerShape,
    x: Tensor,
    matrices: Matrices,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x (n, in) contiguous -> (n, out), with what ``prepare`` made.

    out: contiguous (n, out), written instead of a new tensor; not differentiable then."""
    if form == DENSE:
        return _last(x, matrices[0], bias, out)
    if form == LOW_RANK:
        return _last(plain_product(x, matrices[0]), matrices[1], bias, out)
    first, second = matrices
    if form.second == "fold":
        return _last(_folded(form, shape, x, first), second, bias, out)
    y = (_b_first if form.order == "b" else _a_first)(form, shape, x, first, second, out)
    return y if bias is None else y.add_(bias)  # y is new, and no product's backward reads it


def run_in_chunks(
    form: Form, shape: KroneckerShape, x: Tensor, matrices: Matrices, bias: Tensor | None
) -> Tensor:
    """`run`, a few rows at a time: what lies between the stages stays in cache. No gradients."""
    n, step = x.shape[0], chunk_rows(form, shape, x.element_size())
    if n <= step:
        return run(form, shape, x, matrices, bias)
    y = x.new_empty(n, shape.out_features)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        run(form, shape, x[rows], matrices, bias, out=y[rows])
    return y


def chunk_rows(form: Form, shape: KroneckerShape, itemsize: int) -> int:
    """Rows that a form works on at a time."""
    if "turn" not in form and "mix" not in form:
        return sys.maxsize  # plain products do their own blocking
    per_row = shape.rank * (
        shape.a_in * shape.b_out if form.order == "b" else shape.a_out * shape.b_in
    )
    per_row = max(per_row, shape.out_features, shape.in_features)
    return max(CHUNK_BYTES // (per_row * itemsize), FEWEST_ROWS)


def _folded(form: Form, shape: KroneckerShape, x: Tensor, first: Tensor) -> Tensor:
    """The first stage, when one dense matrix follows: (n, that matrix's columns)."""
    n, s = x.shape[0], shape
    if form.order == "a":
        x = x.view(n, s.a_in, s.b_in).transpose(1, 2).reshape(n * s.b_in, s.a_in)
    elif form.first == "rows":
        x = x.view(n * s.a_in, s.b_in)
    width = s.a_in * s.rank * s.b_out if form.order == "b" else s.b_in * s.a_out * s.rank
    return plain_product(x, first).view(n, width)


def _b_first(
    form: Form, shape: KroneckerShape, x: Tensor, first: Tensor, second: Tensor, out: Tensor | None
) -> Tensor:
    """``b`` on the rows of x, then ``a``."""
    n, s = x.shape[0], shape
    if form.first == "fold":  # lies as the next stage wants it: b_out, a_in, rank
        z = plain_product(x, first)
    else:
        z = plain_product(x.view(n * s.a_in, s.b_in), first)  # a_in, rank, b_out
    if form.second == "mix":
        return _mix(second, z.view(n, s.a_in * s.rank, s.b_out), out)
    if form.first == "rows":
        z = z.view(n, s.a_in * s.rank, s.b_out).transpose(1, 2)
    y = plain_product(z.reshape(n * s.b_out, s.a_in * s.rank), second)
    y = y.view(n, s.b_out, s.a_out).transpose(1, 2)
    if out is None:
        return y.reshape(n, s.out_features)
    out.view(n, s.a_out, s.b_out).copy_(y)
    return out


def _a_first(
    form: Form, shape: KroneckerShape, x: Tensor, first: Tensor, second: Tensor, out: Tensor | None
) -> Tensor:
    """``a`` on slices of x, then ``b``."""
    n, s = x.shape[0], shape
    if form.first == "mix":
        z = _mix(first, x.view(n, s.a_in, s.b_in))  # a_out, rank, b_in
    elif form.first == "fold":
        z = plain_product(x, first)  # a_out, rank, b_in
    else:
        turned = x.view(n, s.a_in, s.b_in).transpose(1, 2).reshape(n * s.b_in, s.a_in)
        z = plain_product(turned, first)  # b_in, a_out, rank
        z = z.view(n, s.b_in, s.a_out * s.rank).transpose(1, 2)
    rows = z.reshape(n * s.a_out, s.rank * s.b_in)
    y = _last(rows, second, None, None if out is None else out.view(n * s.a_out, s.b_out))
    return y.view(n, s.out_features)


def plain_product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x · matrixᵀ + bias``, the matrix as it is or packed."""
    if matrix.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return F.linear(x, matrix, bias)


def packed(matrix: Tensor, n: int) -> Tensor:
    """The matrix in the layout that oneDNN multiplies n rows with, where that pays: bfloat16.

    `F.linear` makes this copy at every call: without it a 768x768 product was 2.2, 1.6 and 1.2
    times as fast at 1, 128 and 1,024 rows (2-core Xeon with AMX, torch 2.13)."""
    if matrix.dtype != torch.bfloat16 or min(matrix.shape) < PACKED_SIDE or not _packs():
        return matrix
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), n)


def packed_all(form: Form, matrices: Matrices, n: int) -> Matrices:
    """`packed`, for those of ``prepare``'s matrices that plain products take."""
    if form == LOW_RANK or form == DENSE:
        return tuple(packed(matrix, n) for matrix in matrices)
    stages = (form.first, form.second)
    return tuple(
        matrix if stage == "mix" else packed(matrix, n)
        for stage, matrix in zip(stages, matrices, strict=True)
    )


@cache
def _packs() -> bool:
    """Whether this build of torch has oneDNN's packed products, which the compiler uses too."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and (
        all(hasattr(torch.ops.mkldnn, name) for name in names)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _last(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`product`, into ``out`` if there is one."""
    if matrix.is_mkldnn:
        y = plain_product(x, matrix, bias)
        return y if out is None else out.copy_(y)
    if out is not None:
        y = torch.mm(x, matrix.t(), out=out)
    elif bias is not None and x.dtype == torch.float32 and x.shape[0] > FEW_ROWS:
        y = F.linear(x, matrix)  # the bias after it: 1.05 times as fast in a whole encoder
    else:
        return F.linear(x, matrix, bias)
    return y if bias is None else y.add_(bias)


def _mix(matrix: Tensor, slices: Tensor, out: Tensor | None = None) -> Tensor:
    """matrix (p, q) over slices (n, q, width): (n, p * width)."""
    n, p, width = slices.shape[0], matrix.shape[0], slices.shape[2]
    small = matrix.expand(n, -1, -1)
    if out is None:
        return torch.bmm(small, slices).view(n, p * width)
    torch.bmm(small, slices, out=out.view(n, p, width))
    return out


def _rows_b(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, first: (rank b_out, b_in), on rows of a_in slices."""
    return b.reshape(-1, b.shape[2])


def _fold_b(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, first, as one matrix: (b_out a_in rank, a_in b_in)."""
    rank, b_out, b_in = b.shape
    a_in = a.shape[2]
    eye = torch.eye(a_in, dtype=b.dtype, device=b.device)
    folded = b.permute(1, 0, 2)[:, None, :, None, :] * eye[None, :, None, :, None]
    return folded.reshape(b_out * a_in * rank, a_in * b_in)


def _mix_a(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second: (a_out, a_in rank)."""
    return a.permute(1, 2, 0).reshape(a.shape[1], -1)


def _fold_a(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, second, as one matrix: (a_out b_out, a_in rank b_out)."""
    rank, a_out, a_in = a.shape
    b_out = b.shape[1]
    eye = torch.eye(b_out, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 2, 0)[:, None, :, :, None] * eye[None, :, None, None, :]
    return folded.reshape(a_out * b_out, a_in * rank * b_out)


def _fold_a_turned(a: Tensor, b: Tensor) -> Tensor:
    """The same for the order in which a folded b leaves its output: (..., b_out a_in rank)."""
    rank, a_out, a_in = a.shape
    b_out = b.shape[1]
    eye = torch.eye(b_out, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 2, 0)[:, None, None, :, :] * eye[None, :, :, None, None]
    return folded.reshape(a_out * b_out, b_out * a_in * rank)


def _mix_a_first(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, first: (a_out rank, a_in)."""
    return a.permute(1, 0, 2).reshape(-1, a.shape[2])


def _fold_a_first(a: Tensor, b: Tensor) -> Tensor:
    """a's stage, first, as one matrix: (a_out rank b_in, a_in b_in)."""
    rank, a_out, a_in = a.shape
    b_in = b.shape[2]
    eye = torch.eye(b_in, dtype=a.dtype, device=a.device)
    folded = a.permute(1, 0, 2)[:, :, None, :, None] * eye[None, None, :, None, :]
    return folded.reshape(a_out * rank * b_in, a_in * b_in)


def _rows_b_second(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, second: (b_out, rank b_in), on rows of a_out slices."""
    return b.permute(1, 0, 2).reshape(b.shape[1], -1)


def _fold_b_second(a: Tensor, b: Tensor) -> Tensor:
    """b's stage, second, as one matrix: (a_out b_out, b_in a_out rank)."""
    rank, b_out, b_in = b.shape
    a_out = a.shape[1]
    eye = torch.eye(a_out, dtype=b.dtype, device=b.device)
    folded = b.permute(1, 2, 0)[None, :, :, None, :] * eye[:, None, None, :, None]
    return folded.reshape(a_out * b_out, b_in * a_out * rank)


_STAGES: dict[Form, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]]
_STAGES = {
    Form("b", "rows", "mix"): (_rows_b, _mix_a),
    Form("b", "rows", "turn"): (_rows_b, _mix_a),
    Form("b", "rows", "fold"): (_rows_b, _fold_a),
    Form("b", "fold", "turn"): (_fold_b, _mix_a),
    Form("b", "fold", "fold"): (_fold_b, _fold_a_turned),
    Form("a", "mix", "rows"): (_mix_a_first, _rows_b_second),
    Form("a", "turn", "rows"): (_mix_a_first, _rows_b_second),
    Form("a", "fold", "rows"): (_fold_a_first, _rows_b_second),
    Form("a", "turn", "fold"): (_mix_a_first, _fold_b_second),
}
