"""A weight as GPTQ's tensors, and the configuration that goes with them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from quire.errors import UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import from_halves, pack
from quire.quantization.pack.checks import check_plain, check_range, turned_scales, zeros_of

Version = Literal["gptq", "gptq_v2"]


def gptq_tensors(
    weight: QuantizedWeight,
    bits: int | None = None,
    version: Version = "gptq",
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Return a weight as ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    Parameters
    ----------
    weight
        Of kind ``int4`` or ``int8``.
    bits
        2 or 3 for a weight of kind ``int4`` whose codes and zeros are that small, or that has no
        zeros and whose codes lie around 8. None: 4 or 8.
    version
        ``checkpoint_format`` of the configuration. The first, which every reader knows, has no
        room for a zero at the smallest code.
    scale_dtype
        What scales are rounded to.

    Raises
    ------
    UnsupportedModelError
        The format has no room for it; the message says why.
    """
    check_plain(weight, "GPTQ", ("int4", "int8"))
    in_features = weight.in_features
    zeros = zeros_of(weight)
    if weight.kind == "int8":
        bits = 8
        codes = weight.codes.view(torch.uint8) ^ 128
        zeros = zeros + 128
    else:
        bits = 4 if bits is None else bits
        codes = from_halves(weight.codes, in_features)
        if weight.zeros is None and bits < 4:
            middle = 1 << bits - 1
            codes = codes.to(torch.int16) - (8 - middle)
            zeros = torch.full_like(zeros, middle)
    check_range(codes, bits, "codes", "GPTQ")
    check_range(zeros, bits, "zeros", "GPTQ")
    if version == "gptq":
        if bool((zeros == 0).any()):
            raise UnsupportedModelError(
                "a zero at the smallest code has no place in checkpoint_format 'gptq', which "
                "stores zero - 1; 'gptq_v2' has one"
            )
        zeros = zeros - 1
    groups = torch.arange(in_features) // min(weight.group_size, in_features)
    if weight.order is not None:
        order = weight.order
        plain = torch.empty_like(codes)
        plain[:, order] = codes
        codes, groups = plain, torch.empty_like(groups).index_copy_(0, order, groups)
    return {
        "qweight": pack(codes, bits).t().contiguous(),
        "qzeros": pack(zeros.t(), bits),
        "scales": turned_scales(weight, scale_dtype, "GPTQ"),
        "g_idx": groups.to(torch.int32),
    }


def gptq_config(
    bits: int,
    group_size: int,
    *,
    sym: bool,
    desc_act: bool = False,
    version: Version = "gptq",
    lm_head: bool = False,
    dynamic: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint with such tensors.

    Parameters
    ----------
    bits, group_size
        Of modules for which `dynamic` says nothing else.
    sym
        Whether all zeros are in the middle of the codes.
    desc_act
        Whether some weight has an order.
    version
        As in `gptq_tensors`.
    lm_head
        Whether the output layer is quantized.
    dynamic
        Settings by regular expression; see `quire.quantization.gptq_rules.GPTQRules`.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "static_groups": False,
        "true_sequential": True,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": lm_head,
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config
