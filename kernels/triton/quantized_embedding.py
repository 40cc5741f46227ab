"""quantized_embedding on a GPU."""

from __future__ import annotations

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.triton.configs import config_for
from quire.kernels.triton.quantized_rows import add_outliers, dequantize_rows


def quantized_embedding(
    ids: torch.Tensor, weight: QuantizedWeight, dtype: torch.dtype
) -> torch.Tensor:
    """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_embedding`."""
    num_tokens, num_inputs = ids.shape[0], weight.in_features
    outliers, factors = weight.outliers, weight.input_factors
    # Outliers are added to float32 numbers, before factors.
    at_once = outliers is None
    out = torch.empty(
        num_tokens, num_inputs, dtype=dtype if at_once else torch.float32, device=ids.device
    )
    if out.numel() == 0:
        return out.to(dtype)
    codes = weight.codes.contiguous()
    scales = weight.scales.contiguous()
    table = weight.table
    config = config_for("embedding", ids.device, size=num_inputs, dtype=str(dtype)[6:])
    dequantize_rows[(num_tokens, -(-num_inputs // config["BLOCK"]))](
        ids,
        codes.view(torch.uint8) if weight.kind == "fp8" else codes,
        scales,
        scales if weight.zeros is None else weight.zeros.contiguous(),
        scales if table is None else table.contiguous(),
        ids if weight.order is None else weight.order.contiguous(),
        scales if factors is None else factors.contiguous(),
        out,
        ids.stride(0),
        num_inputs,
        scales.shape[1],
        min(weight.group_size, num_inputs),
        codes.shape[1],
        KIND=weight.kind,
        HAS_ZEROS=weight.zeros is not None,
        HAS_ORDER=weight.order is not None,
        HAS_FACTORS=factors is not None and at_once,
        TABLE_STRIDE=16 if table is not None and table.dim() == 2 else 0,
        **config,
    )
    if outliers is None:
        return out
    add_outliers[(num_tokens,)](
        ids,
        outliers.first.contiguous(),
        outliers.columns.contiguous(),
        outliers.values.contiguous(),
        out,
        ids.stride(0),
        num_inputs,
        BLOCK=32,
        num_warps=1,
    )
    if factors is not None:
        out *= factors
    return out.to(dtype)
