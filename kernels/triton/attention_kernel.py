"""The kernel of attention over the paged KV cache: one tile of queries, one range of keys.

A tile's rows are the query heads that share a KV head, of some tokens that follow one another in
one sequence: a key is read once for all of them. Scores are kept in powers of two, and the softmax
is taken as keys come by (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). Where
the keys of a tile are shared out among several programs, each leaves its maximum, sum and weighted
values for `merge_parts` (as Flash-Decoding does).

What it is told by ``tl.constexpr`` decides what is compiled. It runs as it is in Triton's
interpreter, too (``TRITON_INTERPRET=1``), on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def read_rows(
    cache, place, column, is_there, MASKED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Load rows ``[keys, WIDTH]`` of a cache; 0 where there is none."""
    pointers = cache + place[:, None] + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=is_there[:, None] & (column < DIM)[None, :], other=0)
    if DIM == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < DIM)[None, :], other=0)


@triton.jit
def read_scales(
    cache, scales, place, is_there, KIND: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Load the scales ``[keys]`` of rows of codes, ready for what `numbers_of` makes of these."""
    if DIM % 4 == 0:
        # Rows, and so their scales, lie at whole floats.
        pointers = scales + (place // 4 + DIM // 4)
        if MASKED:
            found = tl.load(pointers, mask=is_there, other=0.0)
        else:
            found = tl.load(pointers)
    else:
        bits = tl.zeros(place.shape, dtype=tl.int32)
        for index in tl.static_range(4):
            byte = tl.load(cache + place + (DIM + index), mask=is_there, other=0)
            bits |= (byte.to(tl.int32) & 255) << (8 * index)
        found = bits.to(tl.float32, bitcast=True)
    if KIND == "fp8":
        found *= 256.0
    return found


@triton.jit
def numbers_of(codes, KIND: tl.constexpr):
    """Turn codes into numbers; those of fp8 are 2^8 too small.

    e4m3 is float16 with three bits less of an exponent, and only moved into place. A code that is
    no number is never written.
    """
    if KIND == "fp8":
        bits = codes.to(tl.uint16)
        codes = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return codes


@triton.jit
def attend_range(
    acc,
    highest,
    total,
    query,
    position,
    slope,
    begin,
    stop,
    low,
    high,
    table,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    block_stride,
    head_offset,
    factor,
    cap,
    window,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    FOLDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Take in the keys from `begin` to `stop`, of which those from `low` to `high` may be read.

    Without MASKED, every row sees every key.
    """
    column = tl.arange(0, WIDTH)
    for first in range(begin, stop, KEYS):
        key_place = tl.multiple_of(first, KEYS) + tl.arange(0, KEYS)
        is_there = (key_place >= low) & (key_place < high)
        if MASKED:
            block = tl.load(table + key_place // BLOCK_SIZE, mask=is_there, other=0)
        else:
            block = tl.load(table + key_place // BLOCK_SIZE)
        slot = (key_place % BLOCK_SIZE) * SLOT_STRIDE + head_offset
        place = block.to(tl.int64) * block_stride + slot
        keys = read_rows(key_cache, place, column, is_there, MASKED, DIM, WIDTH)
        if KIND != "float":
            keys = numbers_of(keys, KIND)
        scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee")
        # FOLDS: scores are brought to scale as they are subtracted from, in one instruction.
        if KIND != "float":
            scales = read_scales(key_cache, key_scales, place, is_there, KIND, DIM, MASKED)
            scores *= (scales * factor)[None, :]
        elif not FOLDS:
            scores *= factor
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        if HAS_SLOPES:
            distance = key_place[None, :] - position[:, None]
            scores += slope[:, None] * distance.to(tl.float32)
        if MASKED:
            sees = is_there[None, :] & (key_place[None, :] <= position[:, None])
            if HAS_WINDOW:
                sees = sees & (key_place[None, :] > position[:, None] - window)
            scores = tl.where(sees, scores, float("-inf"))
        if FOLDS:
            new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
        else:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
        if MASKED:
            # A row that has not seen any key yet.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        else:
            base = new_highest
        if FOLDS:
            weights = tl.exp2(scores * factor - base[:, None])
        else:
            weights = tl.exp2(scores - base[:, None])
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(weights, 1)
        acc = acc * fading[:, None]
        values = read_rows(value_cache, place, column, is_there, MASKED, DIM, WIDTH)
        if KIND != "float":
            scales = read_scales(value_cache, value_scales, place, is_there, KIND, DIM, MASKED)
            values = numbers_of(values, KIND).to(tl.float32) * scales[:, None]
        values = values.to(query.dtype)
        acc = tl.dot(weights.to(query.dtype), values, acc=acc, input_precision="ieee")
        highest = new_highest
    return acc, highest, total


@triton.jit(do_not_specialize=["num_items", "table_stride", "window"])
def attend(
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slopes,
    out,
    part_values,
    part_highest,
    part_total,
    block_tables,
    items,
    num_items,
    table_stride,
    query_stride,
    query_head_stride,
    block_stride,
    factor,
    cap,
    window,
    KIND: tl.constexpr,
    FOLDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARED_BY: tl.constexpr,
    HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    KEPT_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attend from the tile of one item to the item's keys.

    Parameters
    ----------
    query : [num_tokens, KV_HEADS * SHARED_BY, DIM], strided along the first two axes
    key_cache, value_cache : [num_blocks, BLOCK_SIZE, KV_HEADS, ROW_WIDTH], codes as int8 or uint8
    key_scales, value_scales : the same as float32; read where KIND is "int8" or "fp8"
    slopes : [KV_HEADS * SHARED_BY], float32; read with HAS_SLOPES
    out : [num_tokens, KV_HEADS * SHARED_BY, DIM]
    part_values : [num_parts, KV_HEADS * SHARES, KEPT_ROWS, DIM], float32
    part_highest, part_total : [num_parts, KV_HEADS * SHARES, KEPT_ROWS], float32
    block_tables : [num_seqs, ...], int32, with `table_stride`
    items : [7, num_items], int32
        Of each item: the row of its block table, its first token and how many there are, how many
        keys the first of these sees, the range of keys, and the part that it leaves behind, or -1
        if nobody else has keys of this tile.
    factor : float
        The scale; times log2(e), or over half the soft-cap times that.
    cap : float
        The soft-cap times log2(e); used with HAS_CAP.
    HEADS, SHARES : int
        The heads of a tile, and in how many such the heads of one KV head are cut.
    KEPT_ROWS : int
        How many rows a tile has at most; the rest up to ROWS are none.
    """
    item = tl.program_id(0) // (KV_HEADS * SHARES)
    share = tl.program_id(0) % (KV_HEADS * SHARES)
    kv_head = share // SHARES
    sequence = tl.load(items + item)
    token = tl.load(items + num_items + item)
    count = tl.load(items + 2 * num_items + item)
    if count == 0:
        # Recorded steps have items to spare.
        return
    end = tl.load(items + 3 * num_items + item)
    low = tl.load(items + 4 * num_items + item)
    high = tl.load(items + 5 * num_items + item)
    part = tl.load(items + 6 * num_items + item)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    step = row // HEADS
    local_head = (share % SHARES) * HEADS + row % HEADS
    head = kv_head * SHARED_BY + local_head
    is_row = (row < KEPT_ROWS) & (step < count) & (local_head < SHARED_BY)
    is_number = is_row[:, None] & (column < DIM)[None, :]
    places = (token + step).to(tl.int64) * query_stride + head * query_head_stride
    found = tl.load(query + places[:, None] + column[None, :], mask=is_number, other=0.0)
    position = end - 1 + step
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=is_row, other=0.0) * LOG2_E
    else:
        slope = tl.zeros((ROWS,), dtype=tl.float32)

    acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    head_offset = kv_head * ROW_WIDTH
    # Between the borders of the window and the diagonal, every row sees every key.
    whole_begin = low // KEYS * KEYS
    whole_stop = tl.maximum(whole_begin, tl.minimum(high, end) // KEYS * KEYS)
    if HAS_WINDOW:
        begin = whole_begin
        seen_by_all = tl.maximum(low, end + count - 1 - window)
        whole_begin = tl.minimum(
            (seen_by_all + KEYS - 1) // KEYS * KEYS, (high + KEYS - 1) // KEYS * KEYS
        )
        whole_stop = tl.maximum(whole_begin, whole_stop)
        acc, highest, total = attend_range(
            acc, highest, total, found, position, slope, begin, whole_begin, low, high, table,
            key_cache, value_cache, key_scales, value_scales, block_stride, head_offset,
            factor, cap, window,
            True, KIND, FOLDS, HAS_WINDOW, HAS_CAP, HAS_SLOPES, BLOCK_SIZE, KV_HEADS * ROW_WIDTH,
            DIM, WIDTH, KEYS,
        )  # fmt: skip
    acc, highest, total = attend_range(
        acc, highest, total, found, position, slope, whole_begin, whole_stop, low, high, table,
        key_cache, value_cache, key_scales, value_scales, block_stride, head_offset,
        factor, cap, window,
        False, KIND, FOLDS, HAS_WINDOW, HAS_CAP, HAS_SLOPES, BLOCK_SIZE, KV_HEADS * ROW_WIDTH,
        DIM, WIDTH, KEYS,
    )  # fmt: skip
    acc, highest, total = attend_range(
        acc, highest, total, found, position, slope, whole_stop, high, low, high, table,
        key_cache, value_cache, key_scales, value_scales, block_stride, head_offset,
        factor, cap, window,
        True, KIND, FOLDS, HAS_WINDOW, HAS_CAP, HAS_SLOPES, BLOCK_SIZE, KV_HEADS * ROW_WIDTH,
        DIM, WIDTH, KEYS,
    )  # fmt: skip

    if part < 0:
        # A row that sees no key at all gets 0.
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        places = ((token + step).to(tl.int64) * (KV_HEADS * SHARED_BY) + head) * DIM
        pointers = out + places[:, None] + column[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=is_number)
    else:
        places = (part.to(tl.int64) * (KV_HEADS * SHARES) + share) * KEPT_ROWS + row
        tl.store(part_values + places[:, None] * DIM + column[None, :], acc, mask=is_number)
        tl.store(part_highest + places, highest, mask=is_row)
        tl.store(part_total + places, total, mask=is_row)


@triton.jit(do_not_specialize=["num_merges"])
def merge_parts(
    out,
    part_values,
    part_highest,
    part_total,
    merges,
    num_merges,
    KV_HEADS: tl.constexpr,
    SHARED_BY: tl.constexpr,
    HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    KEPT_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Put a row of a tile together from its parts, PARTS of them at a time.

    Parameters
    ----------
    merges : [4, num_merges], int32
        Of each tile: its first token and how many there are, its first part and how many there
        are; where these are none, nothing is done.
    """
    row = tl.program_id(0) % KEPT_ROWS
    share = tl.program_id(0) // KEPT_ROWS % (KV_HEADS * SHARES)
    merge = tl.program_id(0) // (KEPT_ROWS * KV_HEADS * SHARES)
    token = tl.load(merges + merge)
    count = tl.load(merges + num_merges + merge)
    first = tl.load(merges + 2 * num_merges + merge)
    number = tl.load(merges + 3 * num_merges + merge)
    step = row // HEADS
    local_head = (share % SHARES) * HEADS + row % HEADS
    is_row = (step < count) & (local_head < SHARED_BY) & (number > 0)
    number = tl.where(is_row, number, 0)
    column = tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), dtype=tl.float32)
    highest = float("-inf")
    total = 0.0
    for begin in range(0, number, PARTS):
        part = begin + tl.arange(0, PARTS)
        is_there = part < number
        places = ((first + part).to(tl.int64) * (KV_HEADS * SHARES) + share) * KEPT_ROWS + row
        part_highs = tl.load(part_highest + places, mask=is_there, other=float("-inf"))
        part_sums = tl.load(part_total + places, mask=is_there, other=0.0)
        values = tl.load(
            part_values + places[:, None] * DIM + column[None, :],
            mask=is_there[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(part_highs, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(part_highs - base)
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(part_sums * weights, 0)
        acc = acc * fading + tl.sum(values * weights[:, None], 0)
        highest = new_highest
    result = acc / tl.where(total == 0.0, 1.0, total)
    head = (share // SHARES) * SHARED_BY + local_head
    place = ((token + step).to(tl.int64) * (KV_HEADS * SHARED_BY) + head) * DIM
    stored = tl.where(is_row, DIM, 0)
    tl.store(out + place + column, result.to(out.dtype.element_ty), mask=column < stored)
