"""The kernel of activations: one function for every element, perhaps times another element."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Return ``1 / (1 + exp(-x))``, of an exponential that is never too large."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent: by its series close to 0, where the quotient loses digits."""
    small = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - small) / (1.0 + small)
    quotient = tl.where(x < 0, -quotient, quotient)
    is_close = tl.abs(x) < 0.3
    near = tl.where(is_close, x, 0.0)
    square = near * near
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = -1.0 / 3.0 + square * series
    return tl.where(is_close, near + near * square * series, quotient)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """Apply a kind of `quire.kernels.interface.Backend.activation` to float32 numbers."""
    if KIND == "silu":
        return x * sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u; 2 * sqrt(2 / pi) stands before it.
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        return x * sigmoid(1.702 * x)
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # and not the larger one: no number stays none
    elif KIND == "relu_squared":
        return tl.where(x < 0, 0.0, x * x)
    else:
        return tanh(x)


@triton.jit
def activate(
    x,
    out,
    size,
    x_stride,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``BLOCK`` elements of a row.

    Parameters
    ----------
    x : [num_rows, size]; with IS_GATED [num_rows, 2 * size], gates first
    out : [num_rows, size]
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    gate = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    result = activated(gate, KIND)
    if IS_GATED:
        factor = tl.load(x + row * x_stride + size + column, mask=there, other=0.0)
        result = result * factor.to(tl.float32)
    tl.store(out + row * size + column, result.to(out.dtype.element_ty), mask=there)
