"""The kernels of adapters' products: rows of many adapters, of any ranks, in one launch.

As Punica's (Chen et al., arXiv:2310.18547), they are given rows sorted by adapter and cut into
tiles, see `quire.kernels.lora.LoraRows`. An adapter's matrices stay where they are: a table has
their addresses. They run as they are in Triton's interpreter, too.

What a step changes is no `tl.constexpr`, and nothing is compiled for a number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(left, right, sums, PRECISION: tl.constexpr):
    """Add a product to sums: of one 16-bit type exactly as it is, else in float32."""
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right, acc=sums)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), acc=sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def shrink_rows(
    x,
    order,
    tiles,
    table,
    parts,
    num_rows,
    max_rank,
    num_inputs,
    x_stride,
    per_part,
    MATRIX: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Multiply a tile's rows with its adapter's matrix: some ranks, some of the inputs.

    Parameters
    ----------
    x : [num_rows, num_inputs]
    order, tiles
        See `LoraRows`.
    table : [num_slots, 4], int64
        Address of ``a``, address of the scales, the rank, and the elements from row to row of
        ``a``.
    parts : [num_parts, num_rows, max_rank], float32
        What the inputs ``[part * per_part, (part + 1) * per_part)`` add; for `sum_parts`.
    MATRIX : dtype
        Of every ``a``.
    ALIGNED : int
        What divides the elements from row to row.
    """
    tile = tiles + tl.program_id(0) * 3
    place = table + tl.load(tile).to(tl.int64) * 4
    rank = tl.load(place + 2).to(tl.int32)
    first_rank = tl.program_id(1) * RANKS
    if first_rank >= rank:
        return
    a = tl.multiple_of(tl.load(place).to(tl.pointer_type(MATRIX)), 16)
    a_stride = tl.multiple_of(tl.load(place + 3), ALIGNED)
    count = tl.load(tile + 2)
    number = tl.arange(0, ROWS)
    is_row = number < count
    row = tl.load(order + tl.load(tile + 1) + number, mask=is_row, other=0)
    ranks = first_rank + tl.arange(0, RANKS)
    is_rank = ranks < rank
    first = tl.program_id(2) * per_part
    end = tl.minimum(first + per_part, num_inputs)
    sums = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for begin in range(first, end, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        is_column = column < end
        inputs = tl.load(
            x + row[:, None] * x_stride + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        factors = tl.load(
            a + ranks.to(tl.int64)[None, :] * a_stride + column[:, None],
            mask=is_rank[None, :] & is_column[:, None],
            other=0.0,
        )
        sums = multiply(inputs, factors, sums, PRECISION)
    part = parts + tl.program_id(2).to(tl.int64) * num_rows * max_rank
    tl.store(
        part + row[:, None] * max_rank + ranks[None, :],
        sums,
        mask=is_row[:, None] & is_rank[None, :],
    )


@triton.jit(do_not_specialize=["num_rows", "max_rank"])
def sum_parts(
    parts,
    slots,
    table,
    shrunk,
    num_rows,
    max_rank,
    num_parts,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Add up what `shrink_rows` made, part by part, and scale it; zeros where there is nothing.

    Parameters
    ----------
    parts, table
        See `shrink_rows`.
    slots : [num_rows], int32
    shrunk : [num_rows, max_rank], float32
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    column = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    slot = tl.load(slots + row, mask=is_row, other=-1)
    place = table + tl.maximum(slot, 0).to(tl.int64) * 4
    rank = tl.load(place + 2, mask=slot >= 0, other=0)
    is_there = column[None, :] < rank[:, None]
    places = row.to(tl.int64)[:, None] * max_rank + column[None, :]
    sums = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    part = parts + places
    for _ in range(num_parts):
        sums += tl.load(part, mask=is_there, other=0.0)
        part += num_rows * max_rank
    scales = tl.load(place + 1, mask=slot >= 0, other=0).to(tl.pointer_type(tl.float32))
    sums *= tl.load(scales[:, None] + column[None, :], mask=is_there, other=0.0)
    tl.store(shrunk + places, sums, mask=is_row[:, None] & (column < max_rank)[None, :])


@triton.jit(do_not_specialize=["shrunk_stride"])
def expand_rows(
    y,
    shrunk,
    order,
    tiles,
    stretches,
    blocks,
    y_stride,
    shrunk_stride,
    MATRIX: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Change one block of the outputs of a tile's rows as its adapter says.

    Parameters
    ----------
    y : [num_rows, num_outputs]
    shrunk : [num_rows, max_rank], float32
    order, tiles
        See `LoraRows`.
    stretches : [num_slots, 2], int64
        Of ``blocks``: an adapter's first, and how many it has.
    blocks : [num_blocks, 8], int64
        First output and end, at most ``OUTPUTS`` apart; first column of ``shrunk``, and how many;
        address of the block's first row of ``b``, elements from row to row; addresses of all of
        the factor and of the offset, or 0.
    ALIGNED : int
        What divides the elements from row to row; those between the rank and its next multiple are
        zeros.
    """
    tile = tiles + tl.program_id(0) * 3
    stretch = stretches + tl.load(tile).to(tl.int64) * 2
    if tl.program_id(1) >= tl.load(stretch + 1):
        return
    block = blocks + (tl.load(stretch) + tl.program_id(1)) * 8
    first, end = tl.load(block), tl.load(block + 1)
    first_rank, rank = tl.load(block + 2), tl.load(block + 3).to(tl.int32)
    b = tl.multiple_of(tl.load(block + 4).to(tl.pointer_type(MATRIX)), 16)
    b_stride = tl.multiple_of(tl.load(block + 5), ALIGNED)
    factor = tl.load(block + 6)
    offset = tl.load(block + 7)
    count = tl.load(tile + 2)
    number = tl.arange(0, ROWS)
    is_row = number < count
    row = tl.load(order + tl.load(tile + 1) + number, mask=is_row, other=0)
    each = tl.arange(0, OUTPUTS)
    output = first + each
    is_output = output < end
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    in_row = (rank + ALIGNED - 1) // ALIGNED * ALIGNED
    for begin in range(0, rank, RANKS):
        ranks = begin + tl.arange(0, RANKS)
        is_rank = ranks < rank
        inputs = tl.load(
            shrunk + row[:, None] * shrunk_stride + first_rank + ranks[None, :],
            mask=is_row[:, None] & is_rank[None, :],
            other=0.0,
        )
        factors = tl.load(
            b + each.to(tl.int64)[None, :] * b_stride + ranks[:, None],
            mask=is_output[None, :] & (ranks < in_row)[:, None],
            other=0.0,
        )
        sums = multiply(inputs, factors, sums, PRECISION)
    places = y + row[:, None] * y_stride + output[None, :]
    is_there = is_row[:, None] & is_output[None, :]
    sums += tl.load(places, mask=is_there, other=0.0).to(tl.float32)
    if factor != 0:
        factors = factor.to(tl.pointer_type(tl.float32))
        sums *= tl.load(factors + output, mask=is_output, other=0.0)[None, :]
    if offset != 0:
        offsets = offset.to(tl.pointer_type(tl.float32))
        sums += tl.load(offsets + output, mask=is_output, other=0.0)[None, :]
    tl.store(places, sums.to(y.dtype.element_ty), mask=is_there)
