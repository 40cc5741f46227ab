"""quantized_linear on a GPU: what is prepared for the kernel, and what is left to plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import quantized_linear as quantized_linear_by_torch
from quire.kernels.triton.quantized_product import quantized_product


class Tiles(NamedTuple):
    """What one program of the kernel computes: rows by outputs, so many inputs at a time."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int


def choose_tiles(num_rows: int, group_size: int, x_dtype: torch.dtype) -> Tiles:
    """Return tiles for a product of that many rows.

    Few rows are bound by the reading of codes: narrow tiles give more programs, which read at the
    same time.
    """
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    inputs = 32 if x_dtype is torch.float32 else 128 if num_rows <= 32 else 64
    # A product has 16 inputs at least, 32 of int8; of pairs of columns it has one half.
    least = 64 if x_dtype is torch.int8 else 32
    while inputs > least and inputs // 2 >= group_size:
        inputs //= 2
    return Tiles(rows, 32 if num_rows <= 16 else 64, inputs, 4)


def is_supported(weight: QuantizedWeight) -> bool:
    """Whether the kernel knows such a weight: no table, no outliers, whole bytes to a group."""
    if weight.kind == "table4" or weight.outliers is not None:
        return False
    in_groups = weight.group_size < weight.in_features
    return not (weight.kind == "int4" and in_groups and weight.group_size % 2)


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
    rounds = weight.activations == "int8"
    if not is_supported(weight) or (rounds and weight.input_factors is not None):
        return quantized_linear_by_torch(x, weight, bias)
    inputs, steps = x, None
    if rounds:
        inputs, steps = _in_steps(x, weight)
        # Codes of fp8 are no integers, but those of the inputs are floats of any type.
        if weight.kind == "fp8":
            inputs = inputs.to(x.dtype)
    elif weight.input_factors is not None:
        inputs = x.float() * weight.input_factors
    if weight.order is not None:
        inputs = inputs[:, weight.order]
    elif inputs.stride(1) != 1:
        inputs = inputs.contiguous()
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    codes = weight.codes.contiguous()
    group_size = min(weight.group_size, weight.in_features)
    tiles = choose_tiles(x.shape[0], group_size, inputs.dtype)
    grid = (-(-x.shape[0] // tiles.rows), -(-weight.out_features // tiles.outputs))
    quantized_product[grid](
        inputs,
        codes.view(torch.uint8) if weight.kind == "fp8" else codes,
        weight.scales.contiguous(),
        weight.scales if weight.zeros is None else weight.zeros.contiguous(),
        weight.scales if steps is None else steps,
        weight.scales if bias is None else bias.contiguous(),
        out,
        x.shape[0],
        weight.out_features,
        weight.in_features,
        weight.scales.shape[1],
        group_size,
        inputs.stride(0),
        codes.shape[1],
        KIND=weight.kind,
        IN_INTEGERS=inputs.dtype is torch.int8,
        HAS_ZEROS=weight.zeros is not None,
        HAS_STEPS=steps is not None,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        INPUTS=tiles.inputs,
        num_warps=tiles.num_warps,
    )
    return out


def _in_steps(x: torch.Tensor, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs as int8, and the step of each row; of a row that is no number, NaN."""
    x = x.float()
    step = x.abs().amax(1) / 127
    if weight.activation_scale is not None:
        step = 0 * step + weight.activation_scale
    whole = (x / step[:, None]).round().clamp(-128, 127)
    is_number = (step > 0) & step.isfinite()
    return whole.where(is_number[:, None], 0).to(torch.int8), step
