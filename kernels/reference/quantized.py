"""Weights in codes: what they stand for, and products with them, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels.quantized import QuantizedWeight

_PANEL_SIZE = 1 << 22
"""Elements of a weight that are dequantized at once: 16 MiB."""


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """Return the weight, ``[out_features, in_features]`` in float32.

    Each value is rounded once for its product with the scale, once where an outlier is added, and
    once for its product with the input's factor.
    """
    values = _values(weight)
    groups = torch.arange(weight.in_features, device=values.device) // weight.group_size
    result = values * weight.scales[:, groups]
    if weight.order is not None:
        ordered = torch.empty_like(result)
        ordered[:, weight.order] = result
        result = ordered
    if weight.outliers is not None:
        rows = torch.arange(weight.out_features, device=values.device)
        rows = rows.repeat_interleave(weight.outliers.first.diff())
        places = (rows, weight.outliers.columns.long())
        result.index_put_(places, weight.outliers.values, accumulate=True)
    if weight.input_factors is not None:
        result *= weight.input_factors
    return result


def _values(weight: QuantizedWeight) -> torch.Tensor:
    if weight.kind == "fp8":
        return weight.codes.float()
    codes = weight.codes
    if weight.kind != "int8":
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, : weight.in_features]
    if weight.kind == "table4":
        assert weight.table is not None
        if weight.table.dim() == 1:
            return weight.table[codes.long()]
        return weight.table.gather(1, codes.long())
    values = codes.float()
    if weight.zeros is None:
        return values if weight.kind == "int8" else values - 8
    groups = torch.arange(weight.in_features, device=codes.device) // weight.group_size
    return values - weight.zeros.float()[:, groups]


def round_activations(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Return the inputs in float32, rounded to what the weight is meant for.

    Parameters
    ----------
    x : Tensor[num_tokens, in_features]
        Already times ``input_factors``.
    weight : QuantizedWeight

    Returns
    -------
    Tensor[num_tokens, in_features], float32
    """
    x = x.float()
    if weight.activations == "float":
        return x
    if weight.activation_scale is not None:
        step = torch.tensor(weight.activation_scale, dtype=torch.float32, device=x.device)
    else:
        step = x.abs().amax(1, keepdim=True) / 127
    # An inverse that is no number: a row of zeros, which stays one. And what is none or infinite
    # is to be seen, though it is cut off.
    return torch.where(step > 0, (x / step).round().clamp(-128, 127) * step, 0) + x * 0


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
    inputs = x.float()
    if weight.activations != "float" and weight.input_factors is not None:
        raise ValueError("inputs that are rounded to 8 bits cannot have factors as well")
    inputs = round_activations(inputs, weight)
    result = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    height = max(1, _PANEL_SIZE // weight.in_features)
    for first in range(0, weight.out_features, height):
        end = min(first + height, weight.out_features)
        panel = dequantize(weight.rows(first, end))
        part = F.linear(inputs, panel)
        if bias is not None:
            part += bias[first:end]
        result[:, first:end] = part
    return result


def quantized_embedding(
    ids: torch.Tensor, weight: QuantizedWeight, dtype: torch.dtype
) -> torch.Tensor:
    """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_embedding`."""
    return dequantize(weight.select(ids)).to(dtype)
