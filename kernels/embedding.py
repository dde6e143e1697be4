"""Embedding rows, summed and normalised in one kernel, and the gradient of what went in.

``out = LN(word rows + type rows + position rows)``; the word table is dense or a Kronecker product
``sum_r a[:, r] ⊗ b[r]`` with b_out = 1, whose rows exist in registers only. Nothing but the mean
and 1/std of a row is kept for the backward pass: the rows are looked up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..errors import ShapeError
from .embedding_tile import embed_norm_kernel, kron_backward_kernel, norm_backward_kernel
from .segment_sum import segment_sum

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

DOT_RANK = 8
"""Ranks above it with a_in = 1, a truncated SVD, are a product for tensor cores in half precision.
In float32, where they have none that is exact, the same product spills."""


WIDEST_DOT = 256
"""Columns of b at once in that product: two tiles of 64 ranks by 1,024 columns would take 260 KiB
of shared memory, where an H200 has 227 and a GeForce 99."""


class Table(NamedTuple):
    """Rows ``ids`` of ``table`` (entries, width). ids (period): row i of the output takes
    ids[i % period]; the period divides the number of rows."""

    ids: Tensor
    table: Tensor
    padding_idx: int | None = None


@dataclass(frozen=True)
class Inputs:
    """What is looked up and how it is normalised. ids (n), int32 or int64, and one floating dtype.

    a (entries, rank, a_in), b (rank, 1, b_in); or b None and a (entries, width). weight None: no
    LayerNorm. Ids outside a table are taken as its nearest entry: a kernel cannot raise."""

    ids: Tensor
    a: Tensor
    b: Tensor | None = None
    position: Table | None = None
    kind: Table | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-12
    padding_idx: int | None = None

    @property
    def width(self) -> int:
        return self.a.shape[-1] * (1 if self.b is None else self.b.shape[-1])


class Gradients(NamedTuple):
    """Of `Inputs`' floating tensors; None for what was not asked for."""

    a: Tensor | None
    b: Tensor | None
    position: Tensor | None
    kind: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def embed_norm(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out (n, width), mean (n), 1/std (n)), the last two float32 and empty without LayerNorm."""
    inputs = require_inputs("embed_norm", inputs)
    n, width = inputs.ids.shape[0], inputs.width
    out = inputs.a.new_empty(n, width)
    rows = n if inputs.weight is not None else 0
    mean, rstd = (inputs.a.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if n:
        sizes = _sizes(inputs, rows_per_program=4)
        with torch.cuda.device_of(out):
            embed_norm_kernel[(triton.cdiv(n, sizes["ROWS"]),)](
                *_pointers(inputs), out, mean, rstd, inputs.bias, inputs.eps, **sizes
            )
    return out, mean, rstd


def embed_norm_backward(
    grad: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor, needs: Sequence[bool]
) -> Gradients:
    """Gradients of the tensors whose place in ``needs``, in `Gradients`' order, is True; grad
    (n, width).

    Each is a sum in a fixed order: sorted ids, partial sums per program, no atomics."""
    need = dict(zip(Gradients._fields, needs, strict=True))
    inputs = require_inputs("embed_norm_backward", inputs)
    n, width = inputs.ids.shape[0], inputs.width
    if grad.shape != (n, width):
        raise ShapeError(
            f"embed_norm_backward: gradient {tuple(grad.shape)}: expected {(n, width)}, the shape "
            "of the output. Flatten its leading dimensions."
        )
    grad = grad.contiguous()
    weight_grad = bias_grad = None
    if inputs.weight is not None:
        grad, weight_grad, bias_grad = _norm_backward(grad, inputs, mean, rstd)
    a_grad = b_grad = None
    if inputs.b is None:
        if need["a"]:
            a_grad = segment_sum(grad, inputs.ids, inputs.a, inputs.padding_idx)
    elif need["a"] or need["b"]:
        a_grad, b_grad = _kron_backward(grad, inputs)
    return Gradients(
        a_grad if need["a"] else None,
        b_grad if need["b"] else None,
        _table_backward(grad, inputs.position) if need["position"] else None,
        _table_backward(grad, inputs.kind) if need["kind"] else None,
        weight_grad if need["weight"] else None,
        bias_grad if need["bias"] and inputs.bias is not None else None,
    )


def _norm_backward(
    grad: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the normalised rows (n, width), of weight and of bias."""
    n, width = grad.shape
    assert inputs.weight is not None
    before = torch.empty_like(grad)
    sizes = _sizes(inputs, rows_per_program=8)
    programs = triton.cdiv(n, sizes["ROWS"])
    partial = grad.new_empty(2, programs, width, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(grad):
            norm_backward_kernel[(programs,)](
                *_pointers(inputs), grad, mean, rstd, before, partial, **sizes
            )
    weight_grad, bias_grad = (part.sum(0).to(grad.dtype) for part in partial)
    return before, weight_grad, bias_grad


def _kron_backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The gradients of a (entries, rank, a_in) and b (rank, 1, b_in); padding gives none."""
    a, b = inputs.a, inputs.b
    assert b is not None
    ids = inputs.ids.clamp(0, a.shape[0] - 1)
    n, (rank, a_in), b_in = ids.shape[0], a.shape[1:], b.shape[2]
    padding = -1 if inputs.padding_idx is None else inputs.padding_idx
    if b_in > 64 or rank > DOT_RANK:  # large enough to be two plain products
        keep = (ids != padding)[:, None, None].to(a.dtype)
        picked = (a[ids] * keep).transpose(1, 2).reshape(n * a_in, rank)
        slices = grad.view(n * a_in, b_in)
        product = (slices @ b[:, 0].T).view(n, a_in, rank).transpose(1, 2).reshape(n, rank * a_in)
        b_grad = (picked.T @ slices).view_as(b)
    else:
        product = grad.new_empty(n, rank * a_in, dtype=torch.float32)
        block_b = triton.next_power_of_2(b_in)
        slices_per_program = 4096 // block_b
        programs = max(1, min(PROGRAMS, triton.cdiv(n * a_in, slices_per_program)))
        partial = grad.new_zeros(programs, rank, b_in, dtype=torch.float32)
        if n:
            with torch.cuda.device_of(grad):
                kron_backward_kernel[(programs, rank)](
                    grad, ids, a, b, product, partial, n * a_in, padding,
                    RANK=rank, A_IN=a_in, B_IN=b_in, BLOCK_B=block_b, SLICES=slices_per_program,
                )  # fmt: skip
        b_grad = partial.sum(0).to(b.dtype).view_as(b)
    table = a.view(a.shape[0], rank * a_in)
    return segment_sum(product, ids, table, inputs.padding_idx).view_as(a), b_grad


PROGRAMS = 264
"""Partial sums of b's gradient: two programs for each of an H100's 132 multiprocessors."""


def _table_backward(grad: Tensor, looked_up: Table | None) -> Tensor | None:
    if looked_up is None:
        return None
    ids, table, padding_idx = looked_up
    period = ids.shape[0]
    if 0 < period < grad.shape[0]:
        grad = grad.view(-1, period, grad.shape[1]).sum(0, dtype=torch.float32)
    return segment_sum(grad, ids, table, padding_idx)


def _pointers(inputs: Inputs) -> tuple[object, ...]:
    """The arguments every kernel that looks rows up begins with."""
    found: list[object] = [inputs.ids, inputs.a, inputs.b]
    sizes: list[object] = [inputs.ids.shape[0], inputs.a.shape[0]]
    for looked_up in (inputs.position, inputs.kind):
        found += (None, None) if looked_up is None else looked_up[:2]
        sizes += (0, 0) if looked_up is None else (looked_up.ids.shape[0], looked_up.table.shape[0])
    return (*found, inputs.weight, *sizes)


def _sizes(inputs: Inputs, rows_per_program: int) -> dict[str, int]:
    """Sizes and blocks: ``rows_per_program`` rows of up to 1,024 columns in four warps.

    Chosen by registers at compile time (at most 234, no spills), not timed."""
    width = inputs.width
    block = width & -width
    chunks = width // block
    if chunks > 8 or block < 16:
        block, chunks = triton.next_power_of_2(width), 1
    rank, a_in, b_in = 1, width, 0
    if inputs.b is not None:
        rank, a_in, b_in = inputs.a.shape[1], inputs.a.shape[2], inputs.b.shape[2]
    dot = b_in > 0 and a_in == 1 and rank > DOT_RANK and inputs.a.dtype != torch.float32
    if dot and block > WIDEST_DOT:
        block, chunks = WIDEST_DOT, chunks * block // WIDEST_DOT
    rows = rows_per_program
    while rows > 1 and rows * block * chunks > 1024 * rows_per_program:
        rows //= 2
    if dot:
        rows = 16  # what a product needs at least
    return {
        "WIDTH": width,
        "BLOCK": block,
        "CHUNKS": chunks,
        "ROWS": rows,
        "RANK": rank,
        "A_IN": a_in,
        "B_IN": b_in,
        "BLOCK_RANK": max(16, min(64, triton.next_power_of_2(rank))) if dot else 0,
        "num_warps": 8 if rows * block * chunks > 1024 * rows_per_program else 4,
    }


def require_inputs(where: str, inputs: Inputs) -> Inputs:
    """``inputs`` with contiguous tensors; `ShapeError` unless they go together."""
    a, b, width = inputs.a, inputs.b, inputs.width
    if inputs.ids.dim() != 1 or inputs.ids.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"{where}: ids {tuple(inputs.ids.shape)} of {inputs.ids.dtype}: expected one dimension "
            "of int32 or int64. Call ids.reshape(-1).long()."
        )
    if a.dtype not in DTYPES:
        raise ShapeError(
            f"{where}: a is {a.dtype}: the kernel computes in float32. Use {where} for float32, "
            "float16 and bfloat16, and plain PyTorch for the rest."
        )
    if b is None and a.dim() != 2:
        raise ShapeError(
            f"{where}: table {tuple(a.shape)} without b: expected (entries, width). For a "
            "Kronecker table pass b too."
        )
    if b is not None and (a.dim() != 3 or b.dim() != 3 or b.shape[:2] != (a.shape[1], 1)):
        raise ShapeError(
            f"{where}: a {tuple(a.shape)}, b {tuple(b.shape)}: expected a (entries, rank, a_in) "
            "and b (rank, 1, b_in) of one group. Use functional.kron_embedding for other tables."
        )
    named = {"b": b, "weight": inputs.weight, "bias": inputs.bias}
    for name, looked_up in (("position", inputs.position), ("type", inputs.kind)):
        if looked_up is None:
            continue
        named[f"{name} table"] = looked_up.table
        period, n = looked_up.ids.numel(), inputs.ids.shape[0]
        if looked_up.ids.dim() != 1 or (n % period if period else n):
            raise ShapeError(
                f"{where}: {name} ids {tuple(looked_up.ids.shape)} beside {n} ids: expected one "
                "dimension whose size divides that number. Expand them to the ids' shape."
            )
        if looked_up.table.dim() != 2 or looked_up.table.shape[1] != width:
            raise ShapeError(
                f"{where}: {name} table {tuple(looked_up.table.shape)}: expected a width of "
                f"{width}, that of the words. Check which model it comes from."
            )
    for name in ("weight", "bias"):
        tensor = named[name]
        if tensor is not None and tensor.shape != (width,):
            raise ShapeError(
                f"{where}: {name} {tuple(tensor.shape)}: expected ({width},), one number per "
                "column. Check which LayerNorm it comes from."
            )
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != a.dtype:
            raise ShapeError(
                f"{where}: a is {a.dtype}, {name} is {tensor.dtype}. Cast one of them."
            )

    def flat(looked_up: Table | None) -> Table | None:
        return looked_up and Table(
            looked_up.ids.contiguous(), looked_up.table.contiguous(), looked_up.padding_idx
        )

    return replace(
        inputs,
        ids=inputs.ids.contiguous(),
        a=a.contiguous(),
        b=None if b is None else b.contiguous(),
        position=flat(inputs.position),
        kind=flat(inputs.kind),
        weight=None if inputs.weight is None else inputs.weight.contiguous(),
        bias=None if inputs.bias is None else inputs.bias.contiguous(),
    )
