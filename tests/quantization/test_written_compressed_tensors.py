"""Codes as compressed-tensors: read again they are the same, and its own package reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import NotSupportedError
from quire.kernels.quantized import Outliers, QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.quantization.compressed_tensors import from_config
from quire.quantization.pack.compressed_tensors import quantization_config, scheme_of, tensors_of

MODULE = "model.layers.0.self_attn.q_proj"


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["int8", "w8a8", "w8a8 static", "int4", "fp8"]))
    rows, group_size = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    num_groups = draw(st.integers(1, 4)) if kind in ("int8", "int4") else 1
    columns = group_size * num_groups
    scales = (torch.rand(rows, num_groups) + 0.1).bfloat16().float()
    zeros = None
    if draw(st.booleans()) and kind != "fp8":
        low, high = (0, 16) if kind == "int4" else (-128, 128)
        zeros = torch.randint(low, high, (rows, num_groups), dtype=torch.int16)
    if kind == "int4":
        codes = torch.randint(0, 256, (rows, (columns + 1) // 2), dtype=torch.uint8)
        if columns % 2:
            codes[:, -1] &= 15
        return QuantizedWeight("int4", codes, scales, columns, group_size, zeros=zeros)
    if kind == "fp8":
        codes = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
        return QuantizedWeight("fp8", codes, scales, columns, group_size)
    return QuantizedWeight(
        "int8",
        torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
        scales,
        columns,
        group_size,
        zeros=zeros,
        activations="float" if kind == "int8" else "int8",
        activation_scale=0.125 if "static" in kind else None,
    )


@given(weight=weights(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_written_is_read_again(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """All of it: codes, scales, zeros, and how inputs are rounded."""
    tensors = tensors_of(weight, dtype)
    chosen = from_config(quantization_config({MODULE: scheme_of(weight)}, ["lm_head"]))
    kinds = chosen.kinds(MODULE)
    assert kinds is not None
    assert kinds.required <= set(tensors) <= kinds.required | kinds.optional
    read = chosen.read(MODULE, tensors, (weight.out_features, weight.in_features))
    assert torch.equal(read.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(dequantize(read), dequantize(weight))
    assert (read.kind, read.group_size) == (weight.kind, weight.group_size)
    assert read.activations == weight.activations
    assert read.activation_scale == weight.activation_scale


@given(weight=weights(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_written_is_what_the_package_reads(
    weight: QuantizedWeight, dtype: torch.dtype
) -> None:
    """Bit for bit, in the type of the scales."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    if weight.kind == "int4" and weight.zeros is not None and weight.out_features <= 8:
        return  # the package cannot read zeros of 4 bits that it packed into a single row
    config = quantization_config({MODULE: scheme_of(weight)})
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    found = compressor.decompress(tensors_of(weight, dtype), scheme)["weight"]
    assert torch.equal(found, dequantize(weight).to(dtype))


def test_the_usual_scheme_is_for_all_that_are_not_named() -> None:
    """Others name their modules, and a head is named always; what is plain is ignored."""
    size = 16
    codes = torch.zeros(4, size, dtype=torch.int8)
    int8 = QuantizedWeight("int8", codes, torch.ones(4, 1), size, size)
    nibbles = torch.zeros(4, size // 2, dtype=torch.uint8)
    int4 = QuantizedWeight("int4", nibbles, torch.ones(4, 2), size, 8)
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(3)]
    schemes = {name: scheme_of(int4) for name in names} | {
        "lm_head": scheme_of(int4),
        "model.layers.0.mlp.down_proj": scheme_of(int8),
    }
    config = quantization_config(schemes, ["model.layers.1.mlp.down_proj"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert config["config_groups"]["group_1"]["targets"] == ["model.layers.0.mlp.down_proj"]
    assert config["ignore"] == ["model.layers.1.mlp.down_proj"]
    assert config["format"] == "pack-quantized"
    schemes["lm_head"] = scheme_of(
        QuantizedWeight("int8", codes, torch.ones(4, 1), size, size, activations="int8")
    )
    assert quantization_config(schemes)["format"] == "mixed-precision"
    read = from_config(quantization_config(schemes))
    for name in schemes:
        assert read.kinds(name) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "table4"}, "no codes with a table"),
        ({"order": torch.arange(8)}, "an order of columns"),
        ({"input_factors": torch.ones(8)}, "factors of inputs"),
        (
            {"outliers": Outliers(torch.zeros(5).long(), torch.zeros(0).int(), torch.zeros(0))},
            "outliers",
        ),
        ({"group_size": 3, "scales": torch.ones(4, 3)}, "3 does not divide the 8 inputs"),
        ({"activations": "int8"}, "go with weights of 8 bits"),
        ({"zeros": torch.full((4, 1), 16, dtype=torch.int16)}, "do not fit 4 bits"),
        ({"zeros": torch.full((4, 1), -1, dtype=torch.int16)}, "do not fit 4 bits"),
        ({"scales": torch.full((4, 1), 1e30)}, "do not fit torch.float16"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(fields: dict[str, Any], message: str) -> None:
    """By what it is, with what could be written."""
    usual: dict[str, Any] = {
        "kind": "int4",
        "codes": torch.zeros(4, 4, dtype=torch.uint8),
        "scales": torch.ones(4, 1),
        "in_features": 8,
        "group_size": 8,
    }
    with pytest.raises(NotSupportedError, match=message):
        tensors_of(QuantizedWeight(**usual | fields), torch.float16)
