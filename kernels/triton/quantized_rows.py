"""The kernels of a table in codes: rows of it, dequantized."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.quantized_product import float8_numbers


@triton.jit
def dequantize_rows(
    ids,
    codes,
    scales,
    zeros,
    table,
    order,
    factors,
    out,
    id_stride,
    num_inputs,
    num_groups,
    group_size,
    row_bytes,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``BLOCK`` columns of the row ``ids[program]``, each rounded as the reference does.

    Parameters
    ----------
    ids : [num_tokens], int64
    out : [num_tokens, num_inputs]
    KIND, ... : as for `quire.kernels.triton.quantized_product.quantized_product`
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < num_inputs
    row = tl.load(ids + token * id_stride).to(tl.int64)
    place = row * num_groups + column // group_size
    scale = tl.load(scales + place, mask=there, other=0.0)
    if KIND == "int4" or KIND == "table4":
        found = tl.load(codes + row * row_bytes + column // 2, mask=there, other=0)
        found = (found >> (4 * (column % 2)).to(tl.uint8)) & 15
    else:
        found = tl.load(codes + row * row_bytes + column, mask=there, other=0)
    if KIND == "fp8":
        values = float8_numbers(found)
    elif KIND == "table4":
        entry = row * TABLE_STRIDE + found.to(tl.int64)
        values = tl.load(table + entry, mask=there, other=0.0)
    else:
        values = found.to(tl.float32)
        if HAS_ZEROS:
            values -= tl.load(zeros + place, mask=there, other=0).to(tl.float32)
        elif KIND == "int4":
            values -= 8.0
    values *= scale
    target = column.to(tl.int64)
    if HAS_ORDER:
        target = tl.load(order + column, mask=there, other=0)
    if HAS_FACTORS:
        values *= tl.load(factors + target, mask=there, other=0.0)
    tl.store(out + token * num_inputs + target, values.to(out.dtype.element_ty), mask=there)


@triton.jit
def add_outliers(ids, first, columns, values, out, id_stride, num_inputs, BLOCK: tl.constexpr):
    """Add the outliers of the row ``ids[program]`` to a row of `out`, [num_tokens, num_inputs]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token * id_stride).to(tl.int64)
    begin = tl.load(first + row).to(tl.int32)
    end = tl.load(first + row + 1).to(tl.int32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        there = entry < end
        column = tl.load(columns + entry, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0.0)
        tl.atomic_add(out + token * num_inputs + column, value, mask=there)
