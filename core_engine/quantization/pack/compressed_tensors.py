"""Codes as the tensors of compressed-tensors, and the configuration that goes with them.

Eight bits with rounded inputs become ``int-quantized``, other integers ``pack-quantized``, floats
``float-quantized``: what vLLM and transformers read of that format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from quire.errors import NotSupportedError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import from_halves, pack
from quire.quantization.compressed_tensors_config import Scheme, Strategy
from quire.quantization.modules import is_head


def scheme_of(weight: QuantizedWeight) -> Scheme:
    """Return how a weight is written.

    Raises
    ------
    NotSupportedError
        The format has no place for it.
    """
    if weight.kind == "table4":
        raise NotSupportedError(
            "compressed-tensors has no codes with a table (NF4, FP4, SqueezeLLM); int8, int4 and "
            "fp8 can be written"
        )
    for field, what in (
        ("order", "an order of columns"),
        ("input_factors", "factors of inputs"),
        ("outliers", "outliers"),
    ):
        if getattr(weight, field) is not None:
            raise NotSupportedError(f"compressed-tensors has no place for {what} ({field})")
    if weight.in_features > weight.group_size and weight.in_features % weight.group_size:
        raise NotSupportedError(
            f"compressed-tensors needs groups of one size: {weight.group_size} does not divide "
            f"the {weight.in_features} inputs; take one that does, or one scale per output"
        )
    whole = weight.group_size >= weight.in_features
    strategy: Strategy = "channel" if whole else "group"
    bits = 4 if weight.kind == "int4" else 8
    rounded = weight.activations == "int8"
    if rounded and weight.kind != "int8":
        raise NotSupportedError(
            f"inputs of 8 bits go with weights of 8 bits in compressed-tensors, not {weight.kind}"
        )
    return Scheme(
        packed=weight.kind != "fp8" and not rounded,
        bits=bits,
        floating=weight.kind == "fp8",
        strategy=strategy,
        group_size=0 if whole else weight.group_size,
        symmetric=weight.zeros is None,
        activations=weight.activations,
        static=weight.activation_scale is not None,
    )


def tensors_of(weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a weight's tensors by what follows the module's name and a dot.

    Parameters
    ----------
    weight
        On the CPU.
    scale_dtype
        Of the scales, which are rounded to it. transformers needs the one of the checkpoint's plain
        weights: the products of its linear layers take no two types.

    Raises
    ------
    NotSupportedError
        The format has no place for the weight, or the type none for its scales or zeros.
    """
    scheme = scheme_of(weight)
    scales = weight.scales.to(scale_dtype)
    if not scales.isfinite().all():
        raise NotSupportedError(
            f"scales up to {weight.scales.abs().max().item():g} do not fit {scale_dtype}; "
            "bfloat16 and float32 hold them"
        )
    tensors = {"weight_scale": scales}
    low = -8 if weight.kind == "int4" else -128
    if scheme.packed:
        if weight.kind == "int4":
            values = from_halves(weight.codes, weight.in_features)
        else:
            values = weight.codes.view(torch.uint8) ^ 0x80
        tensors["weight_packed"] = pack(values, scheme.bits)
        tensors["weight_shape"] = torch.tensor([weight.out_features, weight.in_features])
    else:
        tensors["weight"] = weight.codes.contiguous()
    if weight.zeros is not None:
        # As codes of their own: from the lowest code on where they are packed.
        zeros = weight.zeros if weight.kind == "int4" else weight.zeros - low
        if zeros.min() < 0 or zeros.max() >= 1 << scheme.bits:
            raise NotSupportedError(
                f"zeros from {int(weight.zeros.min())} to {int(weight.zeros.max())} do not fit "
                f"{scheme.bits} bits, which compressed-tensors keeps them in"
            )
        if scheme.packed:
            zeros = pack(zeros.t(), scheme.bits).t().contiguous()
        else:
            zeros = weight.zeros.to(torch.int8)
        tensors["weight_zero_point"] = zeros
    if weight.activation_scale is not None:
        tensors["input_scale"] = torch.tensor([weight.activation_scale], dtype=scale_dtype)
    return tensors


def quantization_config(
    schemes: Mapping[str, Scheme], ignored: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what goes into config.json under ``quantization_config``.

    Parameters
    ----------
    schemes
        Of the quantized modules, by the checkpoint's names.
    ignored
        Modules with a plain weight, the head among them if it is; not the embedding.
    """
    counts = Counter(schemes.values())
    groups = {}
    # The most usual is for all that are not named. A head is: to vLLM it is no "Linear".
    for index, (scheme, _) in enumerate(counts.most_common()):
        named = [name for name, each in schemes.items() if each == scheme]
        if index == 0:
            named = ["Linear", *filter(is_head, named)]
        groups[f"group_{index}"] = scheme.as_group(named)
    formats = {scheme.format for scheme in counts}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
