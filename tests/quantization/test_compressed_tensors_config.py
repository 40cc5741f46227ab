"""Configurations of compressed-tensors: its own matching of modules is the oracle, and refusals."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.quantization.compressed_tensors import from_config
from quire.quantization.compressed_tensors_config import Schemes

MODULES = [
    "lm_head",
    *(
        f"model.layers.{index}.{name}"
        for index in (0, 1, 11)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ),
]
TARGETS = [
    "Linear", "lm_head", "model.layers.0.self_attn.q_proj", "re:.*self_attn.*", "re:.*q_proj$",
    "re:.*layers.1.*", "re:model.layers.[01].mlp", "re:(.*up|.*down)_proj", "mlp", "q_proj",
    "Embedding",
]  # fmt: skip
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


def config_of(groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        **fields,
    }


def group_of(targets: list[str], **fields: Any) -> dict[str, Any]:
    weights = {**INT8, **fields.pop("weights", {})}
    return {"targets": targets, "weights": weights, **fields}


@given(
    targets=st.lists(
        st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3), min_size=1, max_size=3
    ),
    ignore=st.lists(st.sampled_from(TARGETS[1:]), max_size=2),
)
def test_modules_are_those_that_the_package_finds(
    targets: list[list[str]], ignore: list[str]
) -> None:
    """A name before an expression before a class; what is ignored, whatever its target."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    groups = {}
    scheme_of: dict[str, int] = {}
    for index, each in enumerate(targets):
        sizes = {"strategy": "group", "group_size": 8 << index}
        groups[f"group_{index}"] = group_of(each, weights=sizes)
        scheme_of |= dict.fromkeys(each, 8 << index)
    schemes = Schemes(config_of(groups, ignore=ignore))
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        expected = None
        matched = match_targets(module, linear, scheme_of)
        if matched and not is_match(module, linear, ignore):
            expected = scheme_of[matched[0]]
        found = schemes.of(module)
        assert (None if found is None else found.group_size) == expected


def test_embeddings_are_no_linear_modules() -> None:
    """They are quantized only where they are named, or their class is."""
    groups = {"group_0": group_of(["Linear"])}
    assert from_config(config_of(groups)).kinds("model.embed_tokens") is None
    groups["group_1"] = group_of(["Embedding"])
    assert from_config(config_of(groups)).kinds("model.embed_tokens") is not None


def test_groups_may_differ_in_format() -> None:
    """Each has its own, or that of all; mixed ones without one are packed unless inputs are."""
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    groups = {
        "group_0": group_of(["re:.*mlp"], weights={"num_bits": 4}),
        "group_1": group_of(["re:.*self_attn"], input_activations=inputs),
        "group_2": group_of(["lm_head"], weights={"type": "float"}, format="float-quantized"),
    }
    chosen = from_config(config_of(groups, format="mixed-precision"))
    expected = {
        "model.layers.0.mlp.up_proj": "weight_packed",
        "model.layers.0.self_attn.q_proj": "weight",
        "lm_head": "weight",
    }
    for module, kind in expected.items():
        kinds = chosen.kinds(module)
        assert kinds is not None
        assert kind in kinds.required


def test_what_says_nothing_about_weights_passes() -> None:
    """Fields of older and newer releases, and the scheme of a cache, whose scales are left out."""
    group = group_of(["Linear"], output_activations=None)
    group["weights"] |= {
        "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
        "block_structure": None, "group_size": -1, "zp_dtype": "torch.int8",
        "scale_dtype": "torch.bfloat16", "symmetric": True, "a_later_field": None,
    }  # fmt: skip
    config = config_of(
        {"group_0": group},
        version="0.20.0",
        global_compression_ratio=1.5,
        sparsity_config={"format": "dense"},
        transform_config={},
        kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"},
        ignore=None,
    )
    kinds = from_config(config).kinds("model.layers.0.self_attn.k_proj")
    assert kinds is not None
    assert "k_scale" in kinds.optional


UNSUPPORTED = [
    ({"format": "marlin-24"}, "format is 'marlin-24', which is not offered; offered are pack"),
    ({"format": "nvfp4-pack-quantized"}, "not offered; offered are"),
    ({"format": "dense"}, "not offered"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "neither sparse nor rotated"),
    ({"transform_config": {"config_groups": {"a": {}}}}, "neither sparse nor rotated"),
    ({"moe_sparsity_config": {"a": 1}}, "moe_sparsity_config is .* may change the numbers"),
    ({"group": {"output_activations": INT8}}, "output_activations is not offered"),
    ({"group": {"weights": None, "input_activations": INT8}}, "rounds inputs of weights that"),
    ({"group": {"input_activations": INT8}}, "it is offered for int-quantized ones"),
    ({"group": {"extra": 1}}, "extra is 1; this field is unknown"),
    ({"weights": {"type": "float", "num_bits": 4}}, "NVFP4, MXFP4|packed"),
    ({"weights": {"type": "float", "num_bits": 4}, "format": "naive-quantized"}, "NVFP4, MXFP4"),
    ({"weights": {"type": "float"}}, "packed are integers of 2, 4 or 8 bits"),
    ({"weights": {"num_bits": 3}}, "packed are integers of 2, 4 or 8 bits"),
    ({"weights": {"num_bits": 16}}, "at most 8 are offered"),
    ({"weights": {"dynamic": True}}, "weights have fixed scales"),
    ({"weights": {"strategy": "tensor_group", "group_size": 16}}, "offered are tensor, channel"),
    ({"weights": {"scale_dtype": "torch.uint8"}}, "MXFP8"),
    ({"weights": {"actorder": "group"}}, "actorder is offered for"),
    ({"weights": {"surprise": 5}}, "surprise is 5; this field is unknown"),
    ({"weights": {"type": "float", "symmetric": False}, "format": "float-quantized"}, "for floats"),
]
INPUTS = [
    ({"num_bits": 4, "dynamic": True, "strategy": "token"}, "inputs of 8 bits are offered"),
    ({"dynamic": "local", "strategy": "tensor_group"}, "a local scale"),
    ({"dynamic": True, "strategy": "tensor"}, "dynamic scales; 'token' is offered"),
    ({"dynamic": False, "strategy": "token"}, "fixed scales; 'tensor' is offered"),
    ({"dynamic": True, "strategy": "token", "symmetric": False}, "without a zero point"),
]
SENSELESS = [
    ({"format": 4}, "must be the name of a format"),
    ({"config_groups": None}, "config_groups is None; it must be an object"),
    ({"config_groups": {}}, "names no targets"),
    ({"config_groups": {"W8A8": ["Linear"]}}, r"config_groups.W8A8 is .*must be an object"),
    ({"ignore": "lm_head"}, "list of module names"),
    ({"ignore": ["re:("]}, "no regular expression"),
    ({"kv_cache_scheme": 8}, "kv_cache_scheme is 8"),
    ({"group": {"targets": "Linear"}}, "list of module names"),
    ({"group": {"targets": [3]}}, "list of module names"),
    ({"group": {"targets": []}}, "names no targets"),
    ({"group": {"weights": 8}}, "weights is 8; it must be an object"),
    ({"weights": {"num_bits": "4"}}, "num_bits is '4'"),
    ({"weights": {"num_bits": 0}}, "num_bits is 0"),
    ({"weights": {"type": "bool"}}, "'int' or 'float'"),
    ({"weights": {"symmetric": "no"}}, "true or false"),
    ({"weights": {"strategy": "group"}}, "the strategy needs one"),
    ({"weights": {"strategy": "group", "group_size": 0}}, "or -1 for all"),
    ({"weights": {"strategy": "group", "group_size": True}}, "or -1 for all"),
    ({"weights": {"strategy": "block"}}, r"such as \[128, 128\]"),
    ({"weights": {"strategy": "block", "block_structure": [0, 1]}}, r"such as \[128, 128\]"),
    ({"weights": {"strategy": "block", "block_structure": "axb"}}, r"such as \[128, 128\]"),
    ({"weights": {"actorder": "sideways"}}, "'weight' or 'group'"),
    ({"weights": {"type": "float"}, "format": "int-quantized"}, "type is 'float' in the format"),
]


def _changed(changes: dict[str, Any]) -> dict[str, Any]:
    changes = dict(changes)
    group = group_of(["Linear"], weights=changes.pop("weights", {}))
    group |= changes.pop("group", {})
    return config_of({"group_0": group}, **{"config_groups": {"group_0": group}} | changes)


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_what_is_not_offered_is_said(changes: dict[str, Any], message: str) -> None:
    """With the field, its value and what would work."""
    with pytest.raises(UnsupportedModelError, match=message):
        from_config(_changed(changes))


@pytest.mark.parametrize(("inputs", "message"), INPUTS)
def test_inputs_that_are_rounded_otherwise_are_refused(
    inputs: dict[str, Any], message: str
) -> None:
    """Offered are dynamic scales of each token, and one fixed scale."""
    inputs = {"num_bits": 8, "type": "int", **inputs}
    changes = {"format": "int-quantized", "group": {"input_activations": inputs}}
    with pytest.raises(UnsupportedModelError, match=message):
        from_config(_changed(changes))


@pytest.mark.parametrize(("changes", "message"), SENSELESS)
def test_what_makes_no_sense_is_said(changes: dict[str, Any], message: str) -> None:
    """With the field, its value and what it must be."""
    with pytest.raises(ModelLoadError, match=message) as caught:
        from_config(_changed(changes))
    assert not isinstance(caught.value, UnsupportedModelError)


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*.*.*.*.*.*.*x", "(.|a)*b"])
def test_expressions_cannot_keep_the_engine_busy(pattern: str) -> None:
    """Those that may take exponential time are refused, as targets and in `ignore`."""
    before = time.perf_counter()
    for config in (
        config_of({"group_0": group_of([f"re:{pattern}"])}),
        config_of({"group_0": group_of(["Linear"])}, ignore=[f"re:{pattern}"]),
    ):
        with pytest.raises(ModelLoadError, match="may take forever"):
            from_config(config).kinds("a" * 5_000)
    assert time.perf_counter() - before < 1


def test_many_expressions_may_take_no_longer_than_one() -> None:
    """Of names there may be any number."""
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(5_000)]
    config = config_of({"group_0": group_of(["Linear"])}, ignore=names)
    assert from_config(config).kinds(names[-1]) is None
    many = [f"re:.*(a|b)?.*(c|d)?.*{index}" for index in range(5_000)]
    with pytest.raises(ModelLoadError, match="too many expressions"):
        from_config(config_of({"group_0": group_of(["Linear"])}, ignore=many))
