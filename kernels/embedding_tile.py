"""The kernels of `embedding`: rows that are looked up, summed and normalised in registers.

Sums are fp32. A Python tuple holds the column blocks of a row, which are unrolled.
"""

import triton
import triton.language as tl


@triton.jit
def _table_rows(
    total, ids, table, rows, keep, entries, period, columns, inside, WIDTH: tl.constexpr
):
    """``total`` (ROWS, BLOCK) and the rows of one more dense table."""
    entry = tl.load(ids + rows % period, mask=keep, other=0).to(tl.int64)
    entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
    at = table + entry[:, None] * WIDTH + columns[None, :]
    return total + tl.load(at, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _chunk(
    ids, a, b, position_ids, position, kind_ids, kind,
    n, entries, position_period, positions, kind_period, kinds, rows, columns,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, A_IN: tl.constexpr, B_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Columns of the sum of all looked up rows: (ROWS, BLOCK) fp32, 0 outside."""
    keep = rows < n
    # WIDTH is a multiple of the block wherever there are several.
    inside = columns < WIDTH if CHUNKS * BLOCK != WIDTH else tl.full((BLOCK,), 1, tl.int1)
    both = keep[:, None] & inside[None, :]
    entry = tl.load(ids + rows, mask=keep, other=0).to(tl.int64)
    entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if B_IN == 0:
        at = a + entry[:, None] * WIDTH + columns[None, :]
        total += tl.load(at, mask=both, other=0.0).to(tl.float32)
    elif BLOCK_RANK > 0:
        for start in range(0, RANK, BLOCK_RANK):
            ranks = start + tl.arange(0, BLOCK_RANK)
            valid = ranks < RANK
            left = tl.load(
                a + entry[:, None] * RANK + ranks[None, :],
                mask=keep[:, None] & valid[None, :],
                other=0.0,
            )
            right = tl.load(
                b + ranks[:, None] * WIDTH + columns[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
    else:
        for r in range(RANK):
            at = a + entry[:, None] * (RANK * A_IN) + r * A_IN + (columns // B_IN)[None, :]
            left = tl.load(at, mask=both, other=0.0).to(tl.float32)
            right = tl.load(b + r * B_IN + columns % B_IN, mask=inside, other=0.0)
            total += left * right.to(tl.float32)[None, :]
    if kind is not None:
        total = _table_rows(
            total, kind_ids, kind, rows, keep, kinds, kind_period, columns, inside, WIDTH
        )
    if position is not None:
        total = _table_rows(
            total, position_ids, position, rows, keep, positions, position_period, columns, inside,
            WIDTH,
        )  # fmt: skip
    return total


@triton.jit
def embed_norm_kernel(
    ids, a, b, position_ids, position, kind_ids, kind, weight,
    n, entries, position_period, positions, kind_period, kinds,
    out, mean, rstd, bias, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, A_IN: tl.constexpr, B_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the output, all their columns in registers; the variance is of differences."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = rows < n
    chunks = ()
    total = tl.zeros((ROWS,), tl.float32)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        x = _chunk(
            ids, a, b, position_ids, position, kind_ids, kind,
            n, entries, position_period, positions, kind_period, kinds, rows, columns,
            WIDTH, BLOCK, CHUNKS, ROWS, RANK, A_IN, B_IN, BLOCK_RANK,
        )  # fmt: skip
        if weight is None:
            tl.store(
                out + rows[:, None] * WIDTH + columns[None, :],
                x.to(out.dtype.element_ty),
                mask=keep[:, None] & (columns < WIDTH)[None, :],
            )
        else:
            chunks = chunks + (x,)  # noqa: RUF005
            total += tl.sum(x, 1)
    if weight is not None:
        centre = total / WIDTH
        square = tl.zeros((ROWS,), tl.float32)
        for c in tl.static_range(CHUNKS):
            columns = c * BLOCK + tl.arange(0, BLOCK)
            difference = chunks[c] - centre[:, None]
            if CHUNKS * BLOCK != WIDTH:
                difference = tl.where((columns < WIDTH)[None, :], difference, 0.0)
            square += tl.sum(difference * difference, 1)
        scale = 1.0 / tl.sqrt(square / WIDTH + eps)
        tl.store(mean + rows, centre, mask=keep)
        tl.store(rstd + rows, scale, mask=keep)
        for c in tl.static_range(CHUNKS):
            columns = c * BLOCK + tl.arange(0, BLOCK)
            inside = columns < WIDTH
            y = (chunks[c] - centre[:, None]) * scale[:, None]
            y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            if bias is not None:
                y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(
                out + rows[:, None] * WIDTH + columns[None, :],
                y.to(out.dtype.element_ty),
                mask=keep[:, None] & inside[None, :],
            )


@triton.jit
def norm_backward_kernel(
    ids, a, b, position_ids, position, kind_ids, kind, weight,
    n, entries, position_period, positions, kind_period, kinds,
    grad, mean, rstd, before, partial,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, A_IN: tl.constexpr, B_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """The gradient before LayerNorm, and this program's part of those of weight and bias.

    partial (2, programs, WIDTH) fp32."""
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    keep = rows < n
    centre = tl.load(mean + rows, mask=keep, other=0.0)
    scale = tl.load(rstd + rows, mask=keep, other=0.0)
    normals = ()
    slopes = ()
    slope_mean = tl.zeros((ROWS,), tl.float32)
    product_mean = tl.zeros((ROWS,), tl.float32)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        both = keep[:, None] & inside[None, :]
        x = _chunk(
            ids, a, b, position_ids, position, kind_ids, kind,
            n, entries, position_period, positions, kind_period, kinds, rows, columns,
            WIDTH, BLOCK, CHUNKS, ROWS, RANK, A_IN, B_IN, BLOCK_RANK,
        )  # fmt: skip
        x = (x - centre[:, None]) * scale[:, None]
        at = grad + rows[:, None] * WIDTH + columns[None, :]
        dy = tl.load(at, mask=both, other=0.0).to(tl.float32)
        slot = program * WIDTH + columns
        tl.store(partial + slot, tl.sum(dy * x, 0), mask=inside)
        tl.store(partial + tl.num_programs(0) * WIDTH + slot, tl.sum(dy, 0), mask=inside)
        dy *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        slope_mean += tl.sum(dy, 1)
        product_mean += tl.sum(dy * x, 1)
        normals = normals + (x,)  # noqa: RUF005
        slopes = slopes + (dy,)  # noqa: RUF005
    slope_mean /= WIDTH
    product_mean /= WIDTH
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        dx = slopes[c] - slope_mean[:, None] - normals[c] * product_mean[:, None]
        tl.store(
            before + rows[:, None] * WIDTH + columns[None, :],
            (dx * scale[:, None]).to(before.dtype.element_ty),
            mask=keep[:, None] & (columns < WIDTH)[None, :],
        )


@triton.jit
def kron_backward_kernel(
    grad, ids, a, b, product, partial, count, padding,
    RANK: tl.constexpr, A_IN: tl.constexpr, B_IN: tl.constexpr,
    BLOCK_B: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One rank: ``grad · bᵀ`` per slice of B_IN columns, and this program's part of b's gradient.

    grad (count, B_IN) with count = n * A_IN; product (n, RANK, A_IN) and partial (programs, RANK,
    B_IN) fp32."""
    program, r = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK_B)
    inside = columns < B_IN
    b_row = tl.load(b + r * B_IN + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(program * SLICES, count, tl.num_programs(0) * SLICES):
        slices = start + tl.arange(0, SLICES).to(tl.int64)
        keep = slices < count
        row, i = slices // A_IN, slices % A_IN
        dx = tl.load(
            grad + slices[:, None] * B_IN + columns[None, :],
            mask=keep[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        tl.store(product + (row * RANK + r) * A_IN + i, tl.sum(dx * b_row[None, :], 1), mask=keep)
        entry = tl.load(ids + row, mask=keep, other=0).to(tl.int64)
        value = tl.load(
            a + (entry * RANK + r) * A_IN + i, mask=keep & (entry != padding), other=0.0
        )
        total += tl.sum(dx * value.to(tl.float32)[:, None], 0)
    tl.store(partial + (program.to(tl.int64) * RANK + r) * B_IN + columns, total, mask=inside)
