"""The kernel of a product with a weight in codes: `x @ weight.T`, dequantized as it is read.

What it is told by ``tl.constexpr`` decides what is compiled. It runs as it is in Triton's
interpreter, too (``TRITON_INTERPRET=1``), on a CPU.

What is exact: codes are small numbers that float16, bfloat16 and int8 all hold, so that a block of
codes is multiplied by tensor cores as it is, and scales and zeros come in afterwards, in float32,
group by group: ``scale * (sum(x * code) - zero * sum(x))``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_codes(codes, rows, row_bytes, columns, is_there, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Load codes ``[columns, rows]`` of one byte as numbers of a type that has them exactly."""
    places = rows.to(tl.int64)[None, :] * row_bytes + columns[:, None]
    found = tl.load(codes + places, mask=is_there, other=0)
    if KIND == "int8":
        return found.to(DTYPE)
    # e4m3 is float16 with three bits less of an exponent: moved into place, it is 2^8 too small.
    bits = found.to(tl.uint16)
    halves = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    numbers = halves.to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers).to(DTYPE)


@triton.jit
def read_inputs(x, rows, stride, columns, is_there):
    """Load inputs ``[rows, columns]``."""
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(x + places, mask=is_there, other=0)


@triton.jit
def quantized_product(
    x,
    codes,
    scales,
    zeros,
    steps,
    bias,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    num_groups,
    group_size,
    x_stride,
    row_bytes,
    KIND: tl.constexpr,
    IN_INTEGERS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute ``ROWS`` x ``OUTPUTS`` of a product, ``INPUTS`` columns at a time.

    Parameters
    ----------
    x : [num_rows, num_inputs], float16, bfloat16, float32; or int8 with IN_INTEGERS
    codes : [num_outputs, row_bytes], int8 or uint8
    scales : [num_outputs, num_groups], float32
    zeros : [num_outputs, num_groups], int16; read with HAS_ZEROS
    steps : [num_rows], float32
        What the integers of each row are to be multiplied with; read with HAS_STEPS.
    bias : [num_outputs]; read with HAS_BIAS
    out : [num_rows, num_outputs]
    group_size : int
        Even where KIND is int4 and there is more than one group.
    KIND : "int8", "int4" or "fp8"
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = row < num_rows
    is_output = output < num_outputs
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for group in range(num_groups):
        first = group * group_size
        end = tl.minimum(first + group_size, num_inputs)
        if IN_INTEGERS:
            part = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32)
            total = tl.zeros((ROWS,), dtype=tl.int32)
        else:
            part = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
            total = tl.zeros((ROWS,), dtype=tl.float32)
        for begin in range(first, end, INPUTS):
            if KIND == "int4":
                # A byte has an even column and the odd one after it: each half is one product.
                pair = tl.arange(0, INPUTS // 2)
                even = begin + 2 * pair
                byte_there = (even < end)[:, None] & is_output[None, :]
                places = output.to(tl.int64)[None, :] * row_bytes + (begin // 2 + pair)[:, None]
                both = tl.load(codes + places, mask=byte_there, other=0)
                for half in tl.static_range(2):
                    column = even + half
                    there = is_row[:, None] & (column < end)[None, :]
                    inputs = read_inputs(x, row, x_stride, column, there)
                    numbers = ((both >> (4 * half)) & 15).to(inputs.dtype)
                    if IN_INTEGERS:
                        part = tl.dot(inputs, numbers, acc=part, out_dtype=tl.int32)
                        total += tl.sum(inputs.to(tl.int32), 1)
                    else:
                        part = tl.dot(inputs, numbers, acc=part, input_precision="ieee")
                        total += tl.sum(inputs.to(tl.float32), 1)
            else:
                column = begin + tl.arange(0, INPUTS)
                there = is_row[:, None] & (column < end)[None, :]
                inputs = read_inputs(x, row, x_stride, column, there)
                code_there = (column < end)[:, None] & is_output[None, :]
                numbers = read_codes(
                    codes, output, row_bytes, column, code_there, KIND, inputs.dtype
                )
                if IN_INTEGERS:
                    part = tl.dot(inputs, numbers, acc=part, out_dtype=tl.int32)
                    if HAS_ZEROS:
                        total += tl.sum(inputs.to(tl.int32), 1)
                else:
                    part = tl.dot(inputs, numbers, acc=part, input_precision="ieee")
                    if HAS_ZEROS:
                        total += tl.sum(inputs.to(tl.float32), 1)
        place = output.to(tl.int64) * num_groups + group
        scale = tl.load(scales + place, mask=is_output, other=0.0)
        if HAS_ZEROS:
            zero = tl.load(zeros + place, mask=is_output, other=0)
            part -= total[:, None] * zero.to(part.dtype)[None, :]
        elif KIND == "int4":
            part -= (total * 8)[:, None]
        sums += part.to(tl.float32) * scale[None, :]
    if HAS_STEPS:
        sums *= tl.load(steps + row, mask=is_row, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    there = is_row[:, None] & is_output[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=there)
