"""The kernel that writes keys and values into the paged KV cache, as numbers or in codes.

The bytes of codes are those of the reference, on any GPU: they are made by arithmetic on the bits
of float32, which needs no instruction for fp8.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_fp8(x):
    """Turn float32 from -448 to 448 into e4m3, as bits in int32, to nearest and even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 steps are 2^-9, which is the last digit of numbers from 2^14 on.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def write_row(x, cache, source, place, column, is_there, KIND: tl.constexpr, DIM: tl.constexpr):
    """Copy rows ``[rows, columns]`` from `source` to `place`, in the cache's type or codes."""
    is_number = is_there[:, None] & (column < DIM)[None, :]
    found = tl.load(x + source[:, None] + column[None, :], mask=is_number, other=0.0)
    pointers = cache + place[:, None] + column[None, :]
    if KIND == "float":
        tl.store(pointers, found.to(cache.dtype.element_ty), mask=is_number)
    else:
        found = found.to(tl.float32)
        largest = 127.0 if KIND == "int8" else 448.0
        size = tl.where(found != found, 0.0, tl.abs(found))
        is_nan = tl.max((found != found).to(tl.int32), 1) != 0
        highest = tl.where(is_nan, float("nan"), tl.max(size, 1))
        scale = tl.div_rn(highest, tl.full(highest.shape, largest, tl.float32))
        is_finite = (scale > 0) & (scale < float("inf"))
        divisor = tl.where(is_finite, scale, 1.0)
        steps = tl.where(is_finite[:, None], found, 0.0)
        steps = tl.div_rn(steps, tl.broadcast_to(divisor[:, None], steps.shape))
        steps = tl.minimum(tl.maximum(steps, -largest), largest)
        if KIND == "int8":
            # Numbers from 1.5 * 2^23 on have no digits behind the point: to nearest and even.
            codes = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        else:
            codes = encode_fp8(steps)
        tl.store(pointers, codes.to(tl.uint8), mask=is_number)
        byte = tl.arange(0, 4)
        bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)[None, :]
        pointers = cache + place[:, None] + (DIM + byte)[None, :]
        tl.store(pointers, (bits & 255).to(tl.uint8), mask=is_there[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def write_rows(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    num_rows,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    key_block_stride,
    value_block_stride,
    KIND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write ``ROWS`` keys and values, each of one token and one head, where its slot is.

    Parameters
    ----------
    key, value : [num_tokens, KV_HEADS, DIM], strided along the first two axes
    key_cache, value_cache : [num_blocks, BLOCK_SIZE, KV_HEADS, ROW_WIDTH], codes as uint8
    slots : [num_tokens], int64
        Nothing is written where one is negative.
    num_rows : int
        Tokens times heads.
    KIND : "float", "int8" or "fp8"
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // KV_HEADS).to(tl.int64)
    head = row % KV_HEADS
    slot = tl.load(slots + token, mask=row < num_rows, other=-1)
    is_there = slot >= 0
    slot = tl.where(is_there, slot, 0)
    inside = (slot % BLOCK_SIZE) * (KV_HEADS * ROW_WIDTH) + head * ROW_WIDTH
    block = slot // BLOCK_SIZE
    column = tl.arange(0, WIDTH)
    source = token * key_stride + head * key_head_stride
    place = block * key_block_stride + inside
    write_row(key, key_cache, source, place, column, is_there, KIND, DIM)
    source = token * value_stride + head * value_head_stride
    place = block * value_block_stride + inside
    write_row(value, value_cache, source, place, column, is_there, KIND, DIM)
