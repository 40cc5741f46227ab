"""A weight as AWQ's tensors, and the configuration that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quire.errors import UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.awq import ORDER
from quire.quantization.bits import from_halves, pack
from quire.quantization.pack.checks import check_plain, check_range, turned_scales, zeros_of


def awq_tensors(
    weight: QuantizedWeight, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return a weight as ``qweight``, ``qzeros`` and ``scales`` in the gemm layout.

    Parameters
    ----------
    weight
        Of kind ``int4``, its inputs in their own order; a multiple of 8 outputs.
    scale_dtype
        What scales are rounded to.

    Raises
    ------
    UnsupportedModelError
        The format has no room for it; the message says why.
    """
    check_plain(weight, "AWQ", ("int4",))
    if weight.order is not None:
        raise UnsupportedModelError("AWQ has inputs in their own order only; GPTQ has any")
    if weight.out_features % 8:
        raise UnsupportedModelError(
            f"AWQ needs a multiple of 8 outputs, a weight has {weight.out_features}: leave it as "
            "it is (modules_to_not_convert)"
        )
    zeros = zeros_of(weight)
    check_range(zeros, 4, "zeros", "AWQ")
    codes = from_halves(weight.codes, weight.in_features)
    return {
        "qweight": _packed(codes),
        "qzeros": _packed(zeros),
        "scales": turned_scales(weight, scale_dtype, "AWQ"),
    }


def _packed(values: torch.Tensor) -> torch.Tensor:
    turned = values.t().reshape(values.shape[1], -1, 8)
    return pack(turned[:, :, list(ORDER)].flatten(1), 4)


def awq_config(
    group_size: int, *, zero_point: bool = True, modules_to_not_convert: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint with such tensors.

    Parameters
    ----------
    group_size
        -1: one scale per output.
    zero_point
        Whether zeros differ from 8.
    modules_to_not_convert
        Parts of names of modules in the model's layers that stay as they are.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": "gemm",
        "modules_to_not_convert": list(modules_to_not_convert) or None,
    }
