"""The kernel of a product with a weight in codes: `x @ weight.T`, dequantized as it is read.

What it is told by ``tl.constexpr`` decides what is compiled. It runs as it is in Triton's
interpreter, too (``TRITON_INTERPRET=1``), on a CPU.

There are two ways. Where a block of columns is of one group, codes are multiplied as they are, and
scales and zeros come in afterwards, in float32: ``scale * (sum(x * code) - zero * sum(x))``. Codes
are small numbers that float16, bfloat16 and int8 all hold, so tensor cores make exact products of
them. Where groups are shorter than a block, and with tables, codes become values first, ``scale *
(code - zero)`` in float32; for inputs of 16 bits these are two numbers of 16 bits, the second what
the first has lost, and each is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float8_numbers(found):
    """Return what codes of e4m3, loaded as bytes, stand for, in float32."""
    # e4m3 is float16 with three bits less of an exponent: moved into place, it is 2^8 too small.
    bits = found.to(tl.uint16)
    halves = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), halves.to(tl.float32) * 256.0)


@triton.jit
def code_numbers(found, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """Return codes, loaded as bytes or taken from them, in a type that has them exactly."""
    if KIND == "fp8":
        return float8_numbers(found).to(DTYPE)
    elif KIND == "int4" and not HAS_ZEROS:
        return (found.to(tl.int8) - 8).to(DTYPE)
    else:
        return found.to(DTYPE)


@triton.jit
def code_values(
    found,
    output,
    column,
    there,
    scales,
    zeros,
    table,
    num_groups,
    group_size,
    KIND: tl.constexpr,
    BY_VALUES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
):
    """Return what codes ``[columns, outputs]`` stand for, in float32; 0 where there are none.

    Entries of a table are without their scale, where one comes in afterwards.
    """
    places = output.to(tl.int64)[None, :] * num_groups + (column // group_size)[:, None]
    if KIND == "fp8":
        values = float8_numbers(found)
    elif KIND == "table4":
        entries = found.to(tl.int64) + (output * TABLE_STRIDE).to(tl.int64)[None, :]
        values = tl.load(table + entries, mask=there, other=0.0)
    else:
        values = found.to(tl.float32)
        if HAS_ZEROS:
            values -= tl.load(zeros + places, mask=there, other=0).to(tl.float32)
        elif KIND == "int4":
            values -= 8.0
    if BY_VALUES:
        values *= tl.load(scales + places, mask=there, other=0.0)
    return values


@triton.jit
def multiply_values(inputs, values, sums):
    """Add ``inputs @ values`` to sums; `values` are float32, [columns, outputs]."""
    if inputs.dtype == tl.float32:
        return tl.dot(inputs, values, acc=sums, input_precision="ieee")
    elif inputs.dtype == tl.bfloat16:
        first = values.to(inputs.dtype)
        second = (values - first.to(tl.float32)).to(inputs.dtype)
        sums = tl.dot(inputs, first, acc=sums)
        return tl.dot(inputs, second, acc=sums)
    else:
        # float16 has few exponents: numbers are brought close to 1 before.
        largest = tl.max(tl.abs(values), 0)
        largest = tl.where(largest > 1e-30, largest, 1.0)
        values = values / largest[None, :]
        first = values.to(inputs.dtype)
        second = (values - first.to(tl.float32)).to(inputs.dtype)
        part = tl.dot(inputs, second, acc=tl.dot(inputs, first))
        return sums + part * largest[None, :]


@triton.jit
def read_inputs(x, row, stride, place, is_row, is_column):
    """Load inputs ``[rows, columns]``."""
    places = row.to(tl.int64)[:, None] * stride + place[None, :]
    return tl.load(x + places, mask=is_row[:, None] & is_column[None, :], other=0)


@triton.jit
def multiply_codes(inputs, numbers, part):
    """Add ``inputs @ numbers`` to `part`."""
    if inputs.dtype == tl.int8:
        return tl.dot(inputs, numbers, acc=part, out_dtype=tl.int32)
    else:
        return tl.dot(inputs, numbers, acc=part, input_precision="ieee")


@triton.jit
def multiply_block(
    inputs,
    low,
    found,
    output,
    column,
    there,
    part,
    scales,
    zeros,
    table,
    num_groups,
    group_size,
    KIND: tl.constexpr,
    BY_VALUES: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
):
    """Add inputs ``[rows, columns]`` times codes ``[columns, outputs]`` to `part`."""
    if BY_VALUES or KIND == "table4":
        values = code_values(
            found,
            output,
            column,
            there,
            scales,
            zeros,
            table,
            num_groups,
            group_size,
            KIND,
            BY_VALUES,
            HAS_ZEROS,
            TABLE_STRIDE,
        )
        part = multiply_values(inputs, values, part)
    else:
        numbers = code_numbers(found, KIND, HAS_ZEROS, inputs.dtype)
        part = multiply_codes(inputs, numbers, part)
        if IN_PAIRS:
            part = multiply_codes(low, numbers, part)
    return part


@triton.jit
def scale_group(
    part,
    total,
    output,
    is_output,
    group,
    scales,
    zeros,
    num_groups,
    HAS_ZEROS: tl.constexpr,
):
    """Return what the sums of a group are once zeros are taken off and the scale comes in."""
    place = output.to(tl.int64) * num_groups + group
    scale = tl.load(scales + place, mask=is_output, other=0.0)
    if HAS_ZEROS:
        zero = tl.load(zeros + place, mask=is_output, other=0)
        part -= total[:, None] * zero.to(part.dtype)[None, :]
    return part.to(tl.float32) * scale[None, :]


@triton.jit
def tile_of(program, num_row_tiles, num_output_tiles):
    """Return which rows and outputs a program has: close ones run at the same time.

    So eight tiles of rows are gone over for all outputs before the next eight are, and what these
    programs read is still in the cache.
    """
    per_band = 8 * num_output_tiles
    first = program // per_band * 8
    height = tl.minimum(num_row_tiles - first, 8)
    place = program % per_band
    return first + place % height, place // height


@triton.jit(do_not_specialize=["num_rows"])
def quantized_product(
    x,
    x_low,
    codes,
    scales,
    zeros,
    table,
    steps,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    num_groups,
    group_size,
    x_stride,
    x_odd,
    row_bytes,
    split_size,
    KIND: tl.constexpr,
    BY_VALUES: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    IS_APART: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute ``ROWS`` x ``OUTPUTS`` of a product, ``INPUTS`` columns at a time.

    Parameters
    ----------
    x : [num_rows, x_stride], float16, bfloat16, float32; or int8 if not BY_VALUES
        Column by column; or, with IS_APART, the even columns, and from `x_odd` on the odd ones,
        which is for codes of 4 bits; there, what stands beside the last column is a number.
    x_low : as `x`, what is to be added to it; read with IN_PAIRS
    codes : [num_outputs, row_bytes], int8 or uint8
    scales : [num_outputs, num_groups], float32
    zeros : [num_outputs, num_groups], int16; read with HAS_ZEROS
    table : [16] or [num_outputs, 16], float32
        Of KIND table4; TABLE_STRIDE is 0 or 16.
    steps : [num_rows], float32
        What each row is to be multiplied with; read with HAS_STEPS.
    bias : [num_outputs]; read with HAS_BIAS
    out : [num_rows, num_outputs]; with IN_PARTS [num_splits, num_rows, num_outputs], float32
        The second axis of the grid is splits, each of `split_size` columns. Parts are without
        steps and bias.
    split_size : int
        A multiple of INPUTS.
    KIND : "int8", "int4", "fp8" or "table4"
    BY_VALUES : codes become values first; else INPUTS divides `group_size`, or ONE_GROUP
    """
    row_tile, output_tile = tile_of(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(num_outputs, OUTPUTS)
    )
    row = row_tile * ROWS + tl.arange(0, ROWS)
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    is_row = row < num_rows
    is_output = output < num_outputs
    code_rows = codes + output.to(tl.int64)[None, :] * row_bytes
    if x.dtype.element_ty == tl.int8:
        part = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32)
        total = tl.zeros((ROWS,), dtype=tl.int32)
    else:
        part = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    first = split * split_size
    end = tl.minimum(first + split_size, num_inputs)
    for begin in range(first, end, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        is_column = column < num_inputs
        if KIND == "int4" or KIND == "table4":
            # A byte has an even column and the odd one after it: each half is one product.
            pair = tl.multiple_of(begin // 2, 16) + tl.arange(0, INPUTS // 2)
            is_pair = pair < row_bytes
            found = tl.load(
                code_rows + pair[:, None], mask=is_pair[:, None] & is_output[None, :], other=0
            )
            if IS_APART:
                even = read_inputs(x, row, x_stride, pair, is_row, is_pair)
                odd = read_inputs(x + x_odd, row, x_stride, pair, is_row, is_pair)
                even_low, odd_low = even, odd
                if IN_PAIRS:
                    even_low = read_inputs(x_low, row, x_stride, pair, is_row, is_pair)
                    odd_low = read_inputs(x_low + x_odd, row, x_stride, pair, is_row, is_pair)
            else:
                both = read_inputs(x, row, x_stride, column, is_row, is_column)
                even, odd = tl.split(tl.reshape(both, (ROWS, INPUTS // 2, 2)))
                even_low, odd_low = even, odd
                if IN_PAIRS:
                    both = read_inputs(x_low, row, x_stride, column, is_row, is_column)
                    even_low, odd_low = tl.split(tl.reshape(both, (ROWS, INPUTS // 2, 2)))
            if HAS_ZEROS and not BY_VALUES:
                addends = even.to(total.dtype) + odd.to(total.dtype)
                if IN_PAIRS:
                    addends += even_low.to(total.dtype) + odd_low.to(total.dtype)
                total += tl.sum(addends, 1)
            for half in tl.static_range(2):
                inputs, low = even, even_low
                if half == 1:
                    inputs, low = odd, odd_low
                column = 2 * pair + half
                part = multiply_block(
                    inputs,
                    low,
                    (found >> (4 * half)) & 15,
                    output,
                    column,
                    (column < num_inputs)[:, None] & is_output[None, :],
                    part,
                    scales,
                    zeros,
                    table,
                    num_groups,
                    group_size,
                    KIND,
                    BY_VALUES,
                    IN_PAIRS,
                    HAS_ZEROS,
                    TABLE_STRIDE,
                )
        else:
            there = is_column[:, None] & is_output[None, :]
            found = tl.load(code_rows + column[:, None], mask=there, other=0)
            inputs = read_inputs(x, row, x_stride, column, is_row, is_column)
            low = inputs
            if IN_PAIRS:
                low = read_inputs(x_low, row, x_stride, column, is_row, is_column)
            if HAS_ZEROS and not BY_VALUES:
                addends = inputs.to(total.dtype)
                if IN_PAIRS:
                    addends += low.to(total.dtype)
                total += tl.sum(addends, 1)
            part = multiply_block(
                inputs,
                low,
                found,
                output,
                column,
                there,
                part,
                scales,
                zeros,
                table,
                num_groups,
                group_size,
                KIND,
                BY_VALUES,
                IN_PAIRS,
                HAS_ZEROS,
                TABLE_STRIDE,
            )
        if not BY_VALUES and not ONE_GROUP:
            group = begin // group_size
            sums += scale_group(
                part, total, output, is_output, group, scales, zeros, num_groups, HAS_ZEROS
            )
            part = tl.zeros_like(part)
            total = tl.zeros_like(total)
    if BY_VALUES:
        sums = part
    elif ONE_GROUP:
        sums = scale_group(part, total, output, is_output, 0, scales, zeros, 1, HAS_ZEROS)
    if IN_PARTS:
        out += split.to(tl.int64) * num_rows * num_outputs
    else:
        if HAS_STEPS:
            sums *= tl.load(steps + row, mask=is_row, other=0.0)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    there = is_row[:, None] & is_output[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def add_parts(
    parts,
    steps,
    bias,
    out,
    num_rows,
    num_outputs,
    num_parts,
    HAS_STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum up parts ``[num_parts, num_rows, num_outputs]``, always in their order.

    The rest of the parameters is that of `quantized_product`.
    """
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = output < num_outputs
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    place = row * num_outputs + output
    size = num_rows.to(tl.int64) * num_outputs
    for _ in range(num_parts):
        sums += tl.load(parts + place, mask=there, other=0.0)
        place += size
    if HAS_STEPS:
        sums *= tl.load(steps + row)
    if HAS_BIAS:
        sums += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * num_outputs + output, sums.to(out.dtype.element_ty), mask=there)
