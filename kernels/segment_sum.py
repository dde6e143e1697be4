"""Sums of rows that share an id: the gradient of a table that was looked up in.

Ids are sorted, so that equal ones lie side by side, and summed in chunks; a run of equal ids that
crosses chunks is put together by a second kernel. The order of every sum is fixed by the ids alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError

CHUNK = 32
"""Sorted rows one program adds up, and chunks one step of the second kernel adds up."""


@triton.jit
def _chunk_kernel(
    rows, ordered, order, out, heads, tails, n, padding,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Runs that lie inside a chunk go to ``out``; what is left of one that began before it to
    ``heads``, of one that begins in it and goes on behind it to ``tails``, fp32."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.full((BLOCK,), 1, tl.int1)
    if MASKED:
        keep &= columns < WIDTH
    start = chunk * CHUNK
    current = tl.load(ordered + start)
    open_left = (tl.load(ordered + start - 1, mask=chunk > 0, other=-1) == current) & (chunk > 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(CHUNK):
        at = start + step
        inside = at < n
        entry = tl.load(ordered + at, mask=inside, other=-1)
        ended = entry != current
        closed = ended & (current >= 0) & (current != padding)
        tl.store(
            out + current * WIDTH + columns,
            total.to(out.dtype.element_ty),
            mask=keep & closed & (open_left == 0),
        )
        tl.store(heads + chunk * WIDTH + columns, total, mask=keep & closed & open_left)
        total = tl.where(ended, 0.0, total)
        open_left = open_left & (ended == 0)
        current = entry
        row = tl.load(order + at, mask=inside, other=0)
        value = tl.load(rows + row * WIDTH + columns, mask=keep & inside, other=0.0)
        total += value.to(tl.float32)
    behind = start + CHUNK
    goes_on = (tl.load(ordered + behind, mask=behind < n, other=-2) == current) & (behind < n)
    wanted = keep & (current >= 0) & (current != padding)
    tl.store(heads + chunk * WIDTH + columns, total, mask=wanted & open_left)
    tl.store(tails + chunk * WIDTH + columns, total, mask=wanted & goes_on & (open_left == 0))
    tl.store(
        out + current * WIDTH + columns,
        total.to(out.dtype.element_ty),
        mask=wanted & (goes_on == 0) & (open_left == 0),
    )


@triton.jit
def _join_kernel(
    ordered, out, heads, tails, n, padding,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A run that begins in this program's chunk and goes on: its tail and the heads behind it."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.full((BLOCK,), 1, tl.int1)
    if MASKED:
        keep &= columns < WIDTH
    behind = (chunk + 1) * CHUNK
    current = tl.load(ordered + behind - 1, mask=behind < n, other=-1)
    goes_on = (current >= 0) & (tl.load(ordered + behind, mask=behind < n, other=-2) == current)
    before = tl.load(ordered + chunk * CHUNK - 1, mask=chunk > 0, other=-3)
    if goes_on & (before != current) & (current != padding):
        total = tl.load(tails + chunk * WIDTH + columns, mask=keep, other=0.0)
        following = chunk + 1 + tl.arange(0, CHUNK)
        more = 1
        while more > 0:
            first = tl.load(ordered + following * CHUNK, mask=following * CHUNK < n, other=-1)
            same = first == current
            parts = tl.load(
                heads + following[:, None] * WIDTH + columns[None, :],
                mask=same[:, None] & keep[None, :],
                other=0.0,
            )
            total += tl.sum(parts, 0)
            more = tl.min(same.to(tl.int32), 0)  # a run may go on only behind a full step
            following += CHUNK
        tl.store(out + current * WIDTH + columns, total.to(out.dtype.element_ty), mask=keep)


def segment_sum(rows: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
    """``out[e] = sum of rows[i] with ids[i] = e``: rows (n, width), ids (n) -> like table (entries,
    width). Entry ``padding_idx`` gets 0; ids outside the table count for its nearest entry."""
    n, (entries, width) = ids.shape[0], table.shape
    if ids.dim() != 1 or rows.shape != (n, width):
        raise ShapeError(
            f"segment_sum: rows {tuple(rows.shape)}, ids {tuple(ids.shape)}, table "
            f"{tuple(table.shape)}: expected rows (n, width), ids (n) and table (entries, width)."
        )
    out = torch.zeros_like(table, memory_format=torch.contiguous_format)
    if not n or not entries:
        return out
    ordered, order = torch.sort(ids.clamp(0, entries - 1).long(), stable=True)
    chunks = triton.cdiv(n, CHUNK)
    heads, tails = rows.new_empty(2, chunks, width, dtype=torch.float32).unbind(0)
    sizes = block_sizes(width)
    grid = (chunks, triton.cdiv(width, sizes["BLOCK"]))
    padding = -1 if padding_idx is None else padding_idx
    with torch.cuda.device_of(rows):
        _chunk_kernel[grid](
            rows.contiguous(), ordered, order, out, heads, tails, n, padding,
            WIDTH=width, CHUNK=CHUNK, **sizes,
        )  # fmt: skip
        if chunks > 1:
            _join_kernel[grid](
                ordered, out, heads, tails, n, padding, WIDTH=width, CHUNK=CHUNK, **sizes
            )
    return out


def block_sizes(width: int) -> dict[str, int]:
    """Columns of one program: the largest power of two that divides the width, 256 at most.

    Two warps at 128 or more, so that a row is read in one step; by size, not timed."""
    block = min(256, width & -width)
    masked = block < 16
    if masked:
        block = min(256, max(16, triton.next_power_of_2(width)))
    return {"BLOCK": block, "MASKED": masked, "num_warps": 2 if block >= 128 else 1}
