"""The kernels around a product with codes: its inputs made ready, and what outliers add to it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_steps(x, step):
    """Return ``round(x / step)``, half to even, from -128 to 127; 0 where `step` is no number."""
    is_number = (step > 0) & (step < float("inf"))
    whole = tl.div_rn(x, tl.where(is_number, step, 1.0))
    whole = tl.minimum(tl.maximum(whole, -128.0), 127.0)
    # Added to numbers between 2^23 and 2^24, which are whole, a number is rounded to the nearest.
    whole = (whole + 12582912.0) - 12582912.0
    return tl.where(is_number & (x == x), whole, 0.0)


@triton.jit
def prepare_inputs(
    x,
    order,
    factors,
    out,
    low,
    steps,
    num_inputs,
    x_stride,
    out_stride,
    odd,
    fixed_step,
    HAS_ORDER: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    IN_STEPS: tl.constexpr,
    HAS_FIXED_STEP: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    IS_APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring one row of inputs into the order of columns, times factors, rounded or in pairs.

    Parameters
    ----------
    x : [num_rows, num_inputs]
    order : [num_inputs], int64; read with HAS_ORDER
    factors : [num_inputs], float32; read with HAS_FACTORS
    out : [num_rows, out_stride]
        With IS_APART the even columns, and from `odd` on the odd ones.
    low : as `out`, what is lost of the numbers there; written with IN_PAIRS
    steps : [num_rows], float32
        Written with IN_STEPS, where `out` is ``round(x / step)``: a 127th of the largest size of
        the row, or `fixed_step`; no number where the row has something that is none or infinite.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    step = 1.0
    if IN_STEPS:
        sizes = tl.zeros((BLOCK,), dtype=tl.float32)
        broken = tl.zeros((BLOCK,), dtype=tl.float32)
        for begin in range(0, num_inputs, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            found = tl.load(x + column, mask=column < num_inputs, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, tl.abs(found))
            broken += found * 0.0
        # Either way of finding the largest may pass over what is no number.
        step = tl.div_rn(tl.max(sizes, 0), 127.0)
        if HAS_FIXED_STEP:
            step = fixed_step
        step += tl.sum(broken, 0)
        tl.store(steps + row, step)
    for begin in range(0, num_inputs, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = column < num_inputs
        source = column.to(tl.int64)
        if HAS_ORDER:
            source = tl.load(order + column, mask=there, other=0)
        found = tl.load(x + source, mask=there, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            found *= tl.load(factors + source, mask=there, other=0.0)
        if IN_STEPS:
            found = in_steps(found, tl.zeros((BLOCK,), dtype=tl.float32) + step)
        place = column
        if IS_APART:
            place = (column // 2) + (column % 2) * odd
        number = found.to(out.dtype.element_ty)
        tl.store(out + row * out_stride + place, number, mask=there)
        if IN_PAIRS:
            rest = (found - number.to(tl.float32)).to(out.dtype.element_ty)
            tl.store(low + row * out_stride + place, rest, mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def multiply_outliers(
    x,
    factors,
    steps,
    first,
    columns,
    values,
    out,
    num_rows,
    num_outputs,
    x_stride,
    HAS_FACTORS: tl.constexpr,
    IN_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply ``ROWS`` rows with the outliers of one output.

    Parameters
    ----------
    x : [num_rows, num_inputs], as they came
    factors : [num_inputs], float32; read with HAS_FACTORS
    steps : [num_rows], float32; read with IN_STEPS
        What inputs are rounded by; the result is in steps.
    first : [num_outputs + 1], int64
    columns : [num_entries], int32
    values : [num_entries], float32
    out : [num_rows, num_outputs], float32
    """
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = tl.program_id(0)
    is_row = row < num_rows
    begin = tl.load(first + output).to(tl.int32)
    end = tl.load(first + output + 1).to(tl.int32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        is_entry = entry < end
        column = tl.load(columns + entry, mask=is_entry, other=0)
        value = tl.load(values + entry, mask=is_entry, other=0.0)
        there = is_row[:, None] & is_entry[None, :]
        places = row[:, None] * x_stride + column[None, :]
        found = tl.load(x + places, mask=there, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            found *= tl.load(factors + column, mask=is_entry, other=0.0)[None, :]
        if IN_STEPS:
            found = in_steps(found, tl.load(steps + row, mask=is_row, other=0.0)[:, None])
        sums += tl.sum(found * value[None, :], 1)
    tl.store(out + row * num_outputs + output, sums, mask=is_row)
