"""The ways to run ``x · (sum_r a[r] ⊗ b[r])ᵀ`` on a CPU, each made of plain matrix products.

A product has two stages, one per matrix, in either order. The stage of the large matrix on
contiguous rows is one plain product ("rows"). The other stage has four forms:

    mix     a small matrix over slices: a batched product, with the slices as they lie
    turn    the slices are transposed, multiplied as plain rows, and transposed back
    fold    the stage as one dense matrix (a ⊗ I or I ⊗ b): more FLOPs, no copies
    gather  a tiny ``b`` and the transposition in one pass (`kronbert.native`); "spread" is the way
            back after ``a``, the bias included

"dense" multiplies the weight out. Which is fastest depends on sizes, rows, dtype and machine:
`kronbert.cpu_cost` predicts it. All but gather are differentiable, in the input and in the
matrices; without gradients `kernels=True` lets the kernels mix, too.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .form_matrices import STAGES, Form
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

GATHERED = (Form("b", "gather", "spread"), Form("b", "gather", "fold"))
"""Forms of the kernels, without gradients."""


def forms_of(shape: KroneckerShape, *, kernels: bool = False) -> tuple[Form, ...]:
    """The forms that a product of this shape can take. kernels: those of `kronbert.native` too."""
    if shape.low_rank:
        return DENSE, LOW_RANK
    sides = (2, 4, 8, 16)
    if not kernels or shape.b_in not in sides or shape.a_in % native.LANES:
        return FORMS
    spreads = shape.b_out in sides and shape.a_out % native.LANES == 0
    return (*FORMS, *(GATHERED if spreads else GATHERED[1:]))


def kernels_mix(form: Form, shape: KroneckerShape) -> bool:
    """Whether the kernels can take this form's mix."""
    if form.second == "mix":
        width, slices = shape.b_out, shape.a_in * shape.rank
    else:
        width, slices = shape.b_in, shape.a_in
    return width % native.LANES == 0 and slices <= native.SLICES


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
    first, second = STAGES[form]
    return first(a, b), second(a, b)


def run(
    form: Form,
    shape: KroneckerShape,
    x: Tensor,
    matrices: Matrices,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    kernels: bool = False,
) -> Tensor:
    """x (n, in) contiguous -> (n, out), with what ``prepare`` made.

    out: contiguous (n, out), written instead of a new tensor; not differentiable then. kernels:
    the matrices come from `ready`; no gradients."""
    if form == DENSE:
        return _last(x, matrices[0], bias, out)
    if form == LOW_RANK:
        return _last(plain_product(x, matrices[0]), matrices[1], bias, out)
    first, second = matrices
    if form in GATHERED:
        return _gathered(form, shape, x, first, second, bias, out)
    if form.second == "fold":
        return _last(_folded(form, shape, x, first), second, bias, out)
    if kernels and "mix" in form and kernels_mix(form, shape):
        return _mixed(form, shape, x, first, second, bias, out)
    y = (_b_first if form.order == "b" else _a_first)(form, shape, x, first, second, out)
    return y if bias is None else y.add_(bias)  # y is new, and no product's backward reads it


def run_in_chunks(
    form: Form,
    shape: KroneckerShape,
    x: Tensor,
    matrices: Matrices,
    bias: Tensor | None,
    *,
    kernels: bool = False,
) -> Tensor:
    """`run`, a few rows at a time: what lies between the stages stays in cache. No gradients."""
    n, step = x.shape[0], chunk_rows(form, shape, x.element_size())
    if n <= step:
        return run(form, shape, x, matrices, bias, kernels=kernels)
    y = x.new_empty(n, shape.out_features)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        run(form, shape, x[rows], matrices, bias, out=y[rows], kernels=kernels)
    return y


def chunk_rows(form: Form, shape: KroneckerShape, itemsize: int) -> int:
    """Rows that a form works on at a time."""
    if not {"turn", "mix", "gather"} & set(form):
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


def _mixed(
    form: Form,
    shape: KroneckerShape,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """A form with a mix, by the kernels."""
    n, s = x.shape[0], shape
    if form.order == "b":
        z = plain_product(x.view(n * s.a_in, s.b_in), first)
        return native.mix(z.view(n, s.a_in * s.rank, s.b_out), second, bias, out)
    z = native.mix(x.view(n, s.a_in, s.b_in), first, None)
    into = None if out is None else out.view(n * s.a_out, s.b_out)
    y = _last(z.view(n * s.a_out, s.rank * s.b_in), second, None, into).view(n, s.out_features)
    return y if bias is None else y.add_(bias)


def _gathered(
    form: Form,
    shape: KroneckerShape,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    n, s = x.shape[0], shape
    z = native.gather(x, first, s.a_in)
    if form.second == "fold":
        return _last(z.view(n, -1), second, bias, out)
    y = plain_product(z.view(n * s.b_out, s.rank * s.a_in), second)
    return native.spread(y.view(n, s.b_out, s.a_out), bias, out)


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


def ready(
    form: Form, shape: KroneckerShape, matrices: Matrices, n: int, *, kernels: bool = False
) -> Matrices:
    """``prepare``'s matrices for `run` on about n rows: those of plain products `packed`, those of
    the kernels in float32."""
    if form == LOW_RANK or form == DENSE:
        return tuple(packed(matrix, n) for matrix in matrices)
    if form in GATHERED:
        return matrices[0].float(), packed(matrices[1], n)
    mixes = kernels and kernels_mix(form, shape)
    return tuple(
        packed(matrix, n) if stage != "mix" else matrix.float() if mixes else matrix
        for stage, matrix in zip((form.first, form.second), matrices, strict=True)
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
