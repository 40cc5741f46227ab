"""The kernels of the norms: a program takes one long row, or several short ones."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_part(x, other, out, places, other_places, out_places, there, HAS_OTHER: tl.constexpr):
    """Load numbers as float32; with HAS_OTHER, their sum with others, which is stored, rounded."""
    found = tl.load(x + places, mask=there, other=0.0)
    if HAS_OTHER:
        others = tl.load(other + other_places, mask=there, other=0.0)
        found = (found.to(tl.float32) + others.to(tl.float32)).to(found.dtype)
        tl.store(out + out_places, found, mask=there)
    return found.to(tl.float32)


@triton.jit
def scaled(
    part,
    weight,
    bias,
    column,
    is_column,
    offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Multiply rows by ``weight + offset``, and add the bias."""
    if HAS_WEIGHT:
        factors = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32) + offset
        part = part * factors[None, :]
    if HAS_BIAS:
        part += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return part


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_rows(
    x,
    residual,
    weight,
    total,
    out,
    num_rows,
    num_inner,
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    offset,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divide ``ROWS`` rows by the root of their mean square, `BLOCK` elements at a time.

    Parameters
    ----------
    x : [num_rows // num_inner, num_inner, SIZE], of two strides
    residual : [num_rows, SIZE]; read with HAS_RESIDUAL, where num_inner is 1
    weight : [SIZE]; read with HAS_WEIGHT
    total : [num_rows, SIZE]
        ``x + residual``; written with HAS_RESIDUAL.
    out : [num_rows, SIZE]
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    first = (row // num_inner) * outer_stride + (row % num_inner) * inner_stride
    column = tl.arange(0, BLOCK)
    if BLOCK >= SIZE:
        is_column = column < SIZE
        there = is_row[:, None] & is_column[None, :]
        part = read_part(
            x,
            residual,
            total,
            first[:, None] + column[None, :],
            (row * residual_stride)[:, None] + column[None, :],
            (row * SIZE)[:, None] + column[None, :],
            there,
            HAS_RESIDUAL,
        )
        mean = tl.sum(part * part, 1) / SIZE
        part = part * (1.0 / tl.sqrt_rn(mean + eps))[:, None]
        part = scaled(part, weight, weight, column, is_column, offset, HAS_WEIGHT, False)
        places = (row * SIZE)[:, None] + column[None, :]
        tl.store(out + places, part.to(out.dtype.element_ty), mask=there)
    else:
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for begin in range(0, SIZE, BLOCK):
            place = begin + column
            part = read_part(
                x,
                residual,
                total,
                first[:, None] + place[None, :],
                (row * residual_stride)[:, None] + place[None, :],
                (row * SIZE)[:, None] + place[None, :],
                is_row[:, None] & (place < SIZE)[None, :],
                HAS_RESIDUAL,
            )
            squares += part * part
        factor = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / SIZE + eps)
        if HAS_RESIDUAL:
            tl.debug_barrier()  # what is read now may have been written by another thread
        for begin in range(0, SIZE, BLOCK):
            place = begin + column
            there = is_row[:, None] & (place < SIZE)[None, :]
            places = (row * SIZE)[:, None] + place[None, :]
            if HAS_RESIDUAL:
                part = tl.load(total + places, mask=there, other=0.0).to(tl.float32)
            else:
                part = tl.load(x + first[:, None] + place[None, :], mask=there, other=0.0)
                part = part.to(tl.float32)
            part = part * factor[:, None]
            part = scaled(part, weight, weight, place, place < SIZE, offset, HAS_WEIGHT, False)
            tl.store(out + places, part.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_rows(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_inner,
    outer_stride,
    inner_stride,
    eps,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring ``ROWS`` rows to mean 0 and variance 1, `BLOCK` elements at a time.

    The variance is the mean of squares of differences, which loses nothing where the mean is large.
    Parameters are those of `rms_norm_rows`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    first = (row // num_inner) * outer_stride + (row % num_inner) * inner_stride
    column = tl.arange(0, BLOCK)
    if BLOCK >= SIZE:
        is_column = column < SIZE
        there = is_row[:, None] & is_column[None, :]
        part = tl.load(x + first[:, None] + column[None, :], mask=there, other=0.0).to(tl.float32)
        part -= (tl.sum(part, 1) / SIZE)[:, None]
        # A mean that is no number makes the padding none either, which is nobody's row.
        part = tl.where(is_column[None, :], part, 0.0)
        variance = tl.sum(part * part, 1) / SIZE
        part = part * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
        part = scaled(part, weight, bias, column, is_column, 0.0, HAS_WEIGHT, HAS_BIAS)
        places = (row * SIZE)[:, None] + column[None, :]
        tl.store(out + places, part.to(out.dtype.element_ty), mask=there)
    else:
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for begin in range(0, SIZE, BLOCK):
            place = begin + column
            there = is_row[:, None] & (place < SIZE)[None, :]
            part = tl.load(x + first[:, None] + place[None, :], mask=there, other=0.0)
            sums += part.to(tl.float32)
        mean = tl.sum(sums, 1) / SIZE
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for begin in range(0, SIZE, BLOCK):
            place = begin + column
            there = is_row[:, None] & (place < SIZE)[None, :]
            part = tl.load(x + first[:, None] + place[None, :], mask=there, other=0.0)
            part = tl.where((place < SIZE)[None, :], part.to(tl.float32) - mean[:, None], 0.0)
            squares += part * part
        factor = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / SIZE + eps)
        for begin in range(0, SIZE, BLOCK):
            place = begin + column
            there = is_row[:, None] & (place < SIZE)[None, :]
            part = tl.load(x + first[:, None] + place[None, :], mask=there, other=0.0)
            part = (part.to(tl.float32) - mean[:, None]) * factor[:, None]
            part = scaled(part, weight, bias, place, place < SIZE, 0.0, HAS_WEIGHT, HAS_BIAS)
            places = (row * SIZE)[:, None] + place[None, :]
            tl.store(out + places, part.to(out.dtype.element_ty), mask=there)
