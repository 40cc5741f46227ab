"""AWQ's tensors become the weight that the format's definition gives, and bad ones are named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import plain_packing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize, quantized_linear
from quire.quantization import awq
from quire.quantization.pack.awq import awq_config, awq_tensors

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def drawn(seed: int, out: int, groups: int, size: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (out, groups * size))
    zeros = random.integers(0, 16, (out, groups))
    return codes, zeros, random.normal(size=(out, groups)).astype(np.float16)


@given(
    st.integers(0, 1 << 32),
    st.sampled_from([8, 16, 40]),
    st.integers(1, 4),
    st.sampled_from([1, 7, 16, 32, 128]),
    st.booleans(),
)
def test_gemm_weights_are_what_the_definition_says(
    seed: int, out: int, groups: int, size: int, one_group: bool
) -> None:
    """Bit for bit, for any codes, zeros, sizes of groups, and odd numbers of inputs."""
    groups = 1 if one_group else groups
    codes, zeros, scales = drawn(seed, out, groups, size)
    tensors = plain_packing.awq(codes, zeros, scales)
    config = CONFIG | {"group_size": -1 if one_group else size}
    weight = awq.from_config(config).read(MODULE, tensors, (out, groups * size))
    g_idx = np.arange(groups * size) // size
    assert torch.equal(dequantize(weight), plain_packing.dequantized(codes, zeros, scales, g_idx))
    mine = {each.data_ptr() for each in weight.tensors().values()}
    assert not mine & {each.data_ptr() for each in tensors.values()}


@given(
    st.integers(0, 1 << 32), st.sampled_from([(32, 1), (32, 9), (64, 3), (128, 2)]), st.booleans()
)
def test_gemv_weights_are_what_the_definition_says(
    seed: int, shape: tuple[int, int], one_group: bool
) -> None:
    """Rows of outputs in plain order; zeros and scales padded to what its kernels read at once."""
    size, groups = shape
    groups = 1 if one_group else groups
    codes, zeros, scales = drawn(seed, 8, groups, size)
    if one_group and size < 128:
        size = 128
        codes = np.tile(codes[:, :1], (1, 128))
    width = {32: 4, 64: 2, 128: 1}[size]
    padded = -(-groups // (8 * width)) * 8 * width
    fill = ((0, 0), (0, padded - groups))
    tensors = {
        "qweight": plain_packing.rows(codes, 4),
        "qzeros": plain_packing.rows(np.pad(zeros, fill), 4),
        "scales": torch.tensor(np.pad(scales, fill)),
    }
    config = CONFIG | {"group_size": -1 if one_group else size, "version": "GEMV"}
    weight = awq.from_config(config).read(MODULE, tensors, (8, groups * size))
    g_idx = np.arange(groups * size) // size
    assert torch.equal(dequantize(weight), plain_packing.dequantized(codes, zeros, scales, g_idx))


def test_without_zero_points_the_zero_is_8() -> None:
    """``qzeros`` may then be left out; where they are there, they count."""
    codes, zeros, scales = drawn(1, 16, 2, 32)
    tensors = plain_packing.awq(codes, zeros, scales)
    reader = awq.from_config(CONFIG | {"zero_point": False})
    kinds = reader.kinds(MODULE)
    assert kinds is not None
    assert "qzeros" in kinds.optional
    g_idx = np.arange(64) // 32
    with_zeros = reader.read(MODULE, tensors, (16, 64))
    assert torch.equal(
        dequantize(with_zeros), plain_packing.dequantized(codes, zeros, scales, g_idx)
    )
    del tensors["qzeros"]
    without = reader.read(MODULE, tensors, (16, 64))
    eights = np.full_like(zeros, 8)
    assert without.zeros is None
    assert torch.equal(dequantize(without), plain_packing.dequantized(codes, eights, scales, g_idx))


def test_scales_of_an_activation_function_divide_the_inputs() -> None:
    """They are the following layer's, under a name of its own; a scale of 0 makes no weight."""
    name = awq.owned_name("transformer.blocks.0.ffn.act.scales")
    assert name == "transformer.blocks.0.ffn.down_proj.act_scales"
    name = awq.owned_name("transformer.h.3.mlp.act.scales")
    assert name == "transformer.h.3.mlp.dense_4h_to_h.act_scales"
    assert awq.owned_name("transformer.h.3.mlp.dense_4h_to_h.scales") is None
    reader = awq.from_config(CONFIG)
    kinds = reader.kinds(MODULE)
    assert kinds is not None
    assert "act_scales" in kinds.optional
    codes, zeros, scales = drawn(6, 8, 2, 32)
    tensors = plain_packing.awq(codes, zeros, scales)
    tensors["act_scales"] = torch.rand(64) + 0.5
    weight = reader.read(MODULE, tensors, (8, 64))
    plain = plain_packing.dequantized(codes, zeros, scales, np.arange(64) // 32)
    x = torch.randn(3, 64)
    expected = (x / tensors["act_scales"]).double() @ plain.t().double()
    torch.testing.assert_close(quantized_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-3)
    tensors["act_scales"][3] = 0
    with pytest.raises(ModelLoadError, match="act_scales has 1 of 64 values"):
        reader.read(MODULE, tensors, (8, 64))
    with pytest.raises(ModelLoadError, match=r"act_scales has the shape \[4\]; it must be \[64\]"):
        reader.read(MODULE, tensors | {"act_scales": torch.ones(4)}, (8, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_floating_type_are_kept_exactly(dtype: torch.dtype) -> None:
    """They are widened to float32, not rounded."""
    tensors = plain_packing.awq(*drawn(2, 8, 1, 32))
    tensors["scales"] = tensors["scales"].to(dtype)
    weight = awq.from_config(CONFIG).read(MODULE, tensors, (8, 32))
    assert torch.equal(weight.scales, tensors["scales"].t().float())


def test_names_of_older_tools_are_known() -> None:
    """``w_bit`` and ``q_group_size`` of a quant_config.json, and a version in capitals."""
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    reader = awq.from_config(old)
    assert (reader.group_size, reader.version) == (64, "gemm")


def test_which_modules_are_quantized() -> None:
    """Those in layers, but for those that are named; the output layer where it is said."""
    reader = awq.from_config(CONFIG | {"modules_to_not_convert": ["mlp.gate", "layers.3."]})
    kinds = reader.kinds(MODULE)
    assert kinds is not None
    assert kinds.required == {"qweight", "qzeros", "scales"}
    for name in ("model.layers.0.mlp.gate", "model.layers.3.mlp.up_proj", "lm_head", "model.norm"):
        assert reader.kinds(name) is None
    assert awq.from_config(CONFIG | {"lm_head": True}).kinds("lm_head") == kinds


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 3}, UnsupportedModelError, r"bits .* is 3; .*GPTQ in 2, 3, 4 or 8"),
        ({"bits": None}, ModelLoadError, r"has no 'bits' \(or 'w_bit'\)"),
        ({"bits": "4"}, ModelLoadError, r"bits .* is '4'"),
        ({"group_size": None}, ModelLoadError, r"has no 'group_size' \(or 'q_group_size'\)"),
        ({"group_size": 0}, ModelLoadError, r"group_size .* is 0; .* or -1"),
        ({"group_size": True}, ModelLoadError, r"group_size .* is True"),
        ({"version": "gemv_fast"}, UnsupportedModelError, r"version .* 'gemv_fast'; 'gemm'"),
        ({"version": 1}, ModelLoadError, "version"),
        ({"zero_point": "yes"}, ModelLoadError, "zero_point .* 'yes'; true or false"),
        ({"modules_to_not_convert": [1]}, ModelLoadError, "modules_to_not_convert"),
        ({"pack_dtype": "int16"}, UnsupportedModelError, "pack_dtype .* 'int16'; .*int32"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_why(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """It names the field, the value, and what would be right."""
    with pytest.raises(error, match=message):
        awq.from_config(CONFIG | changes)


def test_a_configuration_that_is_no_object_is_refused() -> None:
    """Whatever JSON has in its place."""
    for content in ([], "awq", 4):
        with pytest.raises(ModelLoadError, match="must be an object"):
            awq.from_config(content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "qweight has the shape [63, 2]; it must be [64, 2]"),
        ("qweight", lambda t: t.t(), "qweight has the shape [2, 64]; it must be [64, 2]"),
        ("qweight", lambda t: t.long(), "qweight is of type int64; it must be int32"),
        ("qzeros", lambda t: t[:1], "qzeros has the shape [1, 2]; it must be [2, 2]"),
        ("qzeros", lambda t: t.float(), "qzeros is of type float32; it must be int32"),
        ("scales", lambda t: t.t(), "scales has the shape [16, 2]; it must be [2, 16]"),
        ("scales", lambda t: t.int(), "scales is of type int32; it must be float16 or"),
        ("scales", lambda t: t * float("nan"), "scales has 32 of 32 values that are infinite"),
        ("scales", lambda t: t / 0, "scales has 32 of 32 values that are infinite"),
        ("scales", None, "scales is missing"),
    ],
)
def test_tensors_that_make_no_weight_are_named(kind: str, change: Any, message: str) -> None:
    """With what they have and what they need."""
    tensors = plain_packing.awq(*drawn(3, 16, 2, 32))
    if change is None:
        del tensors[kind]
    else:
        tensors[kind] = change(tensors[kind])
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        awq.from_config(CONFIG).read(MODULE, tensors, (16, 64))


def test_sizes_that_the_layout_has_no_room_for_are_refused() -> None:
    """A group size that does not divide the inputs, and outputs that fill no words."""
    tensors = plain_packing.awq(*drawn(4, 16, 2, 32))
    with pytest.raises(ModelLoadError, match="group_size 32 does not divide its 48 inputs"):
        awq.from_config(CONFIG).read(MODULE, tensors, (16, 48))
    with pytest.raises(UnsupportedModelError, match=r"12 outputs .*modules_to_not_convert"):
        awq.from_config(CONFIG).read(MODULE, tensors, (12, 64))
    gemv = awq.from_config(CONFIG | {"version": "gemv", "group_size": 16})
    with pytest.raises(UnsupportedModelError, match=r"groups of 16 .* 'gemm'"):
        gemv.read(MODULE, tensors, (16, 64))


@given(st.integers(0, 1 << 32), st.sampled_from([(8, 2, 16), (24, 1, 9)]), st.booleans())
def test_what_is_written_is_what_the_definition_says(
    seed: int, shape: tuple[int, int, int], with_zeros: bool
) -> None:
    """The same words as made one code at a time, and read back they are the same weight."""
    out, groups, size = shape
    codes, zeros, scales = drawn(seed, out, groups, size)
    if not with_zeros:
        zeros = np.full_like(zeros, 8)
    expected = plain_packing.awq(codes, zeros, scales)
    reader = awq.from_config(awq_config(size, zero_point=with_zeros))
    weight = reader.read(MODULE, expected, (out, groups * size))
    written = awq_tensors(weight)
    assert {kind: each.dtype for kind, each in written.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
    }
    assert all(torch.equal(written[kind], each) for kind, each in expected.items())


def test_what_awq_cannot_hold_is_not_written() -> None:
    """Other codes, an order, outputs that fill no words, zeros and scales out of range."""

    def weight(**changes: Any) -> QuantizedWeight:
        made: dict[str, Any] = {
            "kind": "int4",
            "codes": torch.zeros(8, 4, dtype=torch.uint8),
            "scales": torch.ones(8, 1),
            "in_features": 8,
            "group_size": 8,
        }
        return QuantizedWeight(**(made | changes))

    awq_tensors(weight())
    for changes, message in (
        ({"kind": "int8", "codes": torch.zeros(8, 8, dtype=torch.int8)}, "kind 'int8'"),
        ({"order": torch.arange(8)}, "GPTQ has any"),
        ({"input_factors": torch.ones(8)}, "input_factors"),
        ({"activations": "int8"}, "round activations"),
        ({"zeros": torch.full((8, 1), 16, dtype=torch.int16)}, "zeros from 16 to 16"),
        ({"scales": torch.full((8, 1), 1e6)}, "bfloat16"),
        ({"group_size": 5, "scales": torch.ones(8, 2)}, "5 does not divide 8"),
        ({"codes": torch.zeros(7, 4, dtype=torch.uint8), "scales": torch.ones(7, 1)}, "multiple"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            awq_tensors(weight(**changes))
