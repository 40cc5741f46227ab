"""GPTQ's tensors become the weight that the format's definition gives, and bad ones are named."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import plain_packing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.reference.quantized import dequantize
from quire.quantization import gptq
from quire.quantization.bits import PANEL
from quire.quantization.pack.gptq import gptq_config, gptq_tensors

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BITS = st.sampled_from([2, 3, 4, 8])


def drawn(
    seed: int, bits: int, out: int, groups: int, size: int, sym: bool = False, lowest: int = 0
) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (out, groups * size))
    zeros = random.integers(lowest, 1 << bits, (out, groups))
    if sym:
        zeros[:] = 1 << bits - 1
    return codes, zeros, random.normal(size=(out, groups)).astype(np.float16)


@given(
    st.integers(0, 1 << 32),
    BITS,
    st.sampled_from([1, 8, 16, 40]),
    st.integers(1, 4),
    st.sampled_from([1, 7, 8, 32, 128]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.sampled_from(["none", "trivial", "zeros", "random"]),
)
def test_weights_are_what_the_definition_says(
    seed: int,
    bits: int,
    out: int,
    groups: int,
    size: int,
    one_group: bool,
    sym: bool,
    version: str,
    order: str,
) -> None:
    """Bit for bit, for any bits, zeros, orders of inputs, versions, and sizes of groups."""
    groups = 1 if one_group else groups
    count = groups * size
    codes, zeros, scales = drawn(seed, bits, out, groups, size, sym)
    g_idx = np.arange(count) // size
    if order == "random":
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    given_idx = {"none": None, "zeros": np.zeros_like(g_idx)}.get(order, g_idx)
    tensors = plain_packing.gptq(codes, zeros, scales, bits, version=version, g_idx=given_idx)
    changes = {
        "bits": bits,
        "group_size": -1 if one_group else size,
        "sym": sym,
        "desc_act": order == "random",
        "checkpoint_format": version,
    }
    weight = gptq.from_config(CONFIG | changes).read(MODULE, tensors, (out, count))
    expected = plain_packing.dequantized(codes, zeros, scales, g_idx)
    assert torch.equal(dequantize(weight), expected)
    assert weight.kind == ("int8" if bits == 8 else "int4")
    assert (weight.order is not None) == bool((np.diff(g_idx) < 0).any())
    if sym:
        assert weight.zeros is None  # the kernels' fast case
    mine = {each.data_ptr() for each in weight.tensors().values()}
    assert not mine & {each.data_ptr() for each in tensors.values()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_more_outputs_than_are_unpacked_at_once(bits: int, act_order: bool) -> None:
    """Each panel is at its place."""
    codes, zeros, scales = drawn(10, bits, PANEL + 9, 2, 8)
    g_idx = np.tile([1, 0], 8) if act_order else np.arange(16) // 8
    tensors = plain_packing.gptq(codes, zeros, scales, bits, g_idx=g_idx)
    reader = gptq.from_config(CONFIG | {"bits": bits, "group_size": 8})
    weight = reader.read(MODULE, tensors, (PANEL + 9, 16))
    expected = plain_packing.dequantized(codes, zeros, scales, g_idx)
    assert torch.equal(dequantize(weight), expected)


def test_an_order_sorts_inputs_by_group_and_keeps_equals_in_place() -> None:
    """What lets projections of one input that were quantized in one order be joined."""
    codes, zeros, scales = drawn(0, 4, 8, 2, 4)
    g_idx = np.array([1, 0, 0, 1, 1, 0, 1, 0])
    tensors = plain_packing.gptq(codes, zeros, scales, 4, g_idx=g_idx)
    weight = gptq.from_config(CONFIG | {"group_size": 4}).read(MODULE, tensors, (8, 8))
    assert weight.order is not None
    assert weight.order.tolist() == [1, 2, 5, 7, 0, 3, 4, 6]


def test_symmetric_weights_need_no_zeros() -> None:
    """They are in the middle of the codes then."""
    for bits in (2, 3, 4, 8):
        codes, zeros, scales = drawn(5, bits, 8, 2, 16, sym=True)
        tensors = plain_packing.gptq(codes, zeros, scales, bits)
        del tensors["qzeros"]
        reader = gptq.from_config(CONFIG | {"bits": bits, "group_size": 16, "sym": True})
        weight = reader.read(MODULE, tensors, (8, 32))
        expected = plain_packing.dequantized(codes, zeros, scales, np.arange(32) // 16)
        assert torch.equal(dequantize(weight), expected)


@pytest.mark.parametrize(
    ("changes", "required"),
    [
        ({}, {"qweight", "scales", "qzeros"}),
        ({"sym": True}, {"qweight", "scales"}),
        ({"desc_act": True}, {"qweight", "scales", "qzeros", "g_idx"}),
        ({"desc_act": True, "static_groups": True}, {"qweight", "scales", "qzeros"}),
        ({"desc_act": True, "group_size": -1}, {"qweight", "scales", "qzeros"}),
    ],
)
def test_which_tensors_must_be_there(changes: dict[str, Any], required: set[str]) -> None:
    """All others of the format may be."""
    kinds = gptq.from_config(CONFIG | changes).kinds(MODULE)
    assert kinds is not None
    assert kinds.required == required
    assert kinds.required | kinds.optional == {"qweight", "scales", "qzeros", "g_idx"}


def test_which_modules_are_quantized() -> None:
    """Those in layers, or of them those that are named; the output layer where it is said."""
    reader = gptq.from_config(CONFIG)
    assert reader.kinds("model.layers.11.mlp.up_proj") is not None
    assert reader.kinds("lm_head") is None
    assert reader.kinds("model.decoder.project_in") is None
    assert gptq.from_config(CONFIG | {"lm_head": True}).kinds("lm_head") is not None
    some = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]]
    reader = gptq.from_config(CONFIG | {"modules_in_block_to_quantize": some})
    assert reader.kinds("model.layers.0.self_attn.k_proj") is not None
    assert reader.kinds("model.layers.0.self_attn.q_proj") is None


def test_rules_for_modules_are_tried_in_order() -> None:
    """The first that matches the beginning of a name counts; what it leaves out is general."""
    rules = {
        r"-:.*\.layers\.0\.mlp": {},
        r"+:.*\.layers\.(?:0|1)\.": {"bits": 8, "group_size": -1},
        r".*\.down_proj": {"bits": 2, "sym": True},
        "lm_head": {"bits": 8, "group_size": 64},
        "layers": {"bits": 3},
    }
    reader = gptq.from_config(CONFIG | {"dynamic": rules, "lm_head": True, "desc_act": True})

    def settings(name: str) -> tuple[int, int, bool, bool] | None:
        found = reader.rules.settings(name)
        return found and (found.bits, found.group_size, found.sym, found.needs_order)

    assert settings("model.layers.0.mlp.up_proj") is None
    assert settings("model.layers.0.self_attn.q_proj") == (8, -1, False, False)
    assert settings("model.layers.1.mlp.down_proj") == (8, -1, False, False)
    assert settings("model.layers.2.mlp.down_proj") == (2, 32, True, True)
    assert settings("model.layers.10.mlp.up_proj") == (4, 32, False, True)
    assert settings("lm_head") == (8, 64, False, True)
    codes, zeros, scales = drawn(6, 8, 8, 1, 40)
    tensors = plain_packing.gptq(codes, zeros, scales, 8)
    weight = reader.read("model.layers.0.self_attn.q_proj", tensors, (8, 40))
    expected = plain_packing.dequantized(codes, zeros, scales, np.zeros(40, dtype=int))
    assert torch.equal(dequantize(weight), expected)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"-:(.*.*)*x", r"+:.?.?.?.?" * 9 + "$", "(?=a)b"])
def test_a_rule_that_may_take_forever_is_refused(pattern: str) -> None:
    """It says so at once, without having been tried on a name."""
    before = time.perf_counter()
    with pytest.raises(ModelLoadError, match=r"dynamic of GPTQ's configuration .* plainer one"):
        gptq.from_config(CONFIG | {"dynamic": {pattern: {}}})
    assert time.perf_counter() - before < 1


def test_a_rule_has_a_name() -> None:
    """Not every mapping that is handed over comes from JSON."""
    with pytest.raises(ModelLoadError, match=r"dynamic of GPTQ's configuration has the key 3"):
        gptq.from_config(CONFIG | {"dynamic": {3: {}}})


def test_many_rules_may_take_no_longer_than_one() -> None:
    """Of plain names there may be any number."""
    plain = {f"model.layers.{index}.mlp": {"bits": 8} for index in range(3_000)}
    assert gptq.from_config(CONFIG | {"dynamic": plain}).kinds(MODULE) is not None
    slow = {".*.*.*.*.*" + str(index): {"bits": 8} for index in range(100)}
    with pytest.raises(ModelLoadError, match="too many expressions"):
        gptq.from_config(CONFIG | {"dynamic": slow})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 5}, UnsupportedModelError, r"bits .* is 5; one of 2, 3, 4 and 8"),
        ({"bits": None}, ModelLoadError, "has no 'bits'"),
        ({"bits": 4.0}, ModelLoadError, r"bits .* is 4\.0"),
        ({"group_size": None}, ModelLoadError, "has no 'group_size'"),
        ({"group_size": -2}, ModelLoadError, r"group_size .* is -2; .* or -1"),
        ({"checkpoint_format": "marlin"}, UnsupportedModelError, r"'marlin'; 'gptq' and 'gptq_v2'"),
        ({"format": "gptq_p"}, UnsupportedModelError, r"format .* 'gptq_p'"),
        ({"is_marlin_format": True}, UnsupportedModelError, "Marlin"),
        ({"pack_dtype": "int16"}, UnsupportedModelError, r"pack_dtype .* 'int16'; .*int32"),
        ({"adapter": {"rank": 8}}, UnsupportedModelError, "adapter"),
        ({"desc_act": 1}, ModelLoadError, r"desc_act .* is 1; true or false"),
        ({"dynamic": []}, ModelLoadError, "dynamic"),
        ({"dynamic": {"+:a": 4}}, ModelLoadError, r"dynamic\['\+:a'\] .* must be an object"),
        ({"dynamic": {"a": {"bits": 6}}}, UnsupportedModelError, r"dynamic\['a'\] .* is 6"),
        ({"dynamic": {"(": {}}}, ModelLoadError, "no regular expression"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_why(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """It names the field, the value, and what would be right."""
    with pytest.raises(error, match=message):
        gptq.from_config(CONFIG | changes)


_G_IDX = np.arange(64) // 32


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qweight", lambda t: t[1:], "qweight has the shape [7, 16]; it must be [8, 16]"),
        ("qweight", lambda t: t.to(torch.int16), "qweight is of type int16; it must be int32"),
        ("qzeros", lambda t: t.t(), "qzeros has the shape [2, 2]"),
        ("qzeros", None, "qzeros is missing"),
        ("scales", lambda t: t[:1], "scales has the shape [1, 16]; it must be [2, 16]"),
        ("scales", lambda t: t.double(), "scales is of type float64; it must be float16 or"),
        ("scales", lambda t: t / 0, "scales has 32 of 32 values that are infinite"),
        ("g_idx", lambda t: t[:-1], "g_idx has the shape [63]; it must be [64]"),
        ("g_idx", lambda t: t.float(), "g_idx is of type float32; it must be int32 or int64"),
        ("g_idx", lambda t: t - 1, "g_idx has groups from -1 to 0; with 64 inputs in groups of 32"),
        ("g_idx", lambda t: t + 1, "they must be from 0 to 1"),
        ("g_idx", lambda t: t.clamp(min=1), "gives 0 inputs to group 0; each of the 2"),
    ],
)
def test_tensors_that_make_no_weight_are_named(kind: str, change: Any, message: str) -> None:
    """With what they have and what they need."""
    tensors = plain_packing.gptq(*drawn(7, 4, 16, 2, 32), 4, g_idx=_G_IDX)
    if kind == "qzeros" and change is not None:
        tensors["qzeros"] = torch.zeros(3, 2, dtype=torch.int32)
        message = "qzeros has the shape [2, 3]; it must be [2, 2]"
    if change is None:
        del tensors[kind]
    else:
        tensors[kind] = change(tensors[kind])
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        gptq.from_config(CONFIG).read(MODULE, tensors, (16, 64))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    """It says which would work."""
    tensors = plain_packing.gptq(*drawn(8, 4, 16, 2, 32), 4)
    with pytest.raises(ModelLoadError, match="group_size 32 does not divide its 48 inputs"):
        gptq.from_config(CONFIG).read(MODULE, tensors, (16, 48))


@given(
    st.integers(0, 1 << 32),
    BITS,
    st.sampled_from([(8, 2, 16), (24, 1, 9), (40, 3, 32)]),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.booleans(),
)
def test_what_is_written_is_what_the_definition_says(
    seed: int, bits: int, shape: tuple[int, int, int], sym: bool, version: Any, act_order: bool
) -> None:
    """The same words as made one code at a time, with every zero that the version can hold."""
    out, groups, size = shape
    lowest = 1 if version == "gptq" else 0
    codes, zeros, scales = drawn(seed, bits, out, groups, size, sym, lowest)
    g_idx = np.arange(groups * size) // size
    if act_order:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    expected = plain_packing.gptq(codes, zeros, scales, bits, version=version, g_idx=g_idx)
    config = gptq_config(bits, size, sym=sym, desc_act=act_order, version=version)
    weight = gptq.from_config(config).read(MODULE, expected, (out, groups * size))
    written = gptq_tensors(weight, bits, version)
    assert written.keys() == expected.keys()
    for kind, each in expected.items():
        assert written[kind].dtype == each.dtype
        assert torch.equal(written[kind], each)


def test_what_gptq_cannot_hold_is_not_written() -> None:
    """Codes of more bits, zeros out of range, and in the first version a zero of 0."""
    codes, zeros, scales = drawn(9, 4, 8, 1, 32)
    codes[0, 0], zeros[0, 0] = 15, 0
    tensors = plain_packing.gptq(codes, zeros, scales, 4, version="gptq_v2")
    config = gptq_config(4, 32, sym=False, version="gptq_v2")
    weight = gptq.from_config(config).read(MODULE, tensors, (8, 32))
    with pytest.raises(UnsupportedModelError, match="'gptq_v2' has one"):
        gptq_tensors(weight)
    with pytest.raises(UnsupportedModelError, match=r"codes from 0 to 15 do not fit .* 3 bits"):
        gptq_tensors(weight, 3, "gptq_v2")
