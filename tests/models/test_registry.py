"""From a configuration to a family and a spec; what is not supported is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ModelLoadError, NotSupportedError, UnsupportedModelError
from quire.models import registry
from quire.models.alibi import mpt_slopes
from quire.models.families import llama
from quire.models.family import Family
from quire.models.hf_config import read_config
from quire.models.registry import build_spec, family_of, supported_architectures

Make = Callable[[str], Path]


def test_an_unknown_architecture_lists_what_is_supported() -> None:
    """The error names the architecture and every one that would do."""
    with pytest.raises(UnsupportedModelError) as caught:
        build_spec({"architectures": ["BertForMaskedLM"]})
    message = str(caught.value)
    assert "BertForMaskedLM" in message
    assert all(name in message for name in supported_architectures())
    assert isinstance(caught.value, ModelLoadError | NotSupportedError)


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", {}])
def test_a_config_must_name_its_architecture(value: Any) -> None:
    """A configuration without an architecture is an error, not a guess."""
    with pytest.raises(ModelLoadError, match=r"architectures in config\.json"):
        build_spec({"architectures": value})


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("llama", {"num_local_experts": 8}, "num_local_experts.*mixture of experts"),
        ("mixtral", {"n_routed_experts": 8}, "n_routed_experts.*mixture of experts"),
        ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func.*'sigmoid'"),
        ("qwen3-moe", {"routed_scaling_factor": 2.5}, r"routed_scaling_factor.*2\.5"),
        ("qwen3-moe", {"hidden_act": "mish"}, "hidden_act.*'mish'"),
        ("qwen2-moe", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window.*false"),
        ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "xrope"}}, "'xrope'"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "differ from layer to layer"),
        ("llama", {"hidden_act": "mish"}, "hidden_act.*'mish'"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
        ("mpt", {"no_bias": False}, "no_bias"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale"),
    ],
    ids=str,
)
def test_what_a_model_asks_for_and_does_not_get_is_named(
    name: str, override: dict[str, Any], message: str, tiny_checkpoint: Make
) -> None:
    """No feature of a configuration is left out in silence."""
    with pytest.raises(UnsupportedModelError, match=message):
        build_spec(read_config(tiny_checkpoint(name), override))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "4 is no multiple of .* 3"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts.*is 0"),
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts.*'8'"),
        ("mixtral", {"num_experts": 5}, "num_local_experts is 6 and num_experts is 5"),
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok.*7.*6 experts"),
        ("mixtral", {"num_local_experts": 10**12}, "num_local_experts.*10{12}; at most 4096"),
        ("qwen3-moe", {"mlp_only_layers": {}}, "mlp_only_layers.*{}.*list"),
        ("qwen3-moe", {"mlp_only_layers": [-1]}, r"mlp_only_layers.*\[-1\].*0 to "),
        ("qwen2-moe", {"mlp_only_layers": 1}, "mlp_only_layers.*1"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen2-moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen3-moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ("gpt-neox", {"num_attention_heads": 5}, "64 is no multiple of the 5"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"layer_types": ["full_attention"]}, "lists 1 layers"),
        ("mpt", {"attn_config": 3}, "attn_config"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "partial_rotary_factor"),
        ("phi3-longrope", {"rope_parameters": {"long_factor": [1.0]}}, "1 frequencies"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_named(
    name: str, override: dict[str, Any], message: str, tiny_checkpoint: Make
) -> None:
    """A broken configuration is an error of its own, not a failure further down."""
    with pytest.raises(ModelLoadError, match=message):
        build_spec(read_config(tiny_checkpoint(name), override))


def test_specs_are_values(tiny_checkpoint: Make) -> None:
    """Equal configurations give equal, hashable specs; the longest length is part of it."""
    config = read_config(tiny_checkpoint("phi3-longrope"))
    assert build_spec(config, 256) == build_spec(config)
    assert hash(build_spec(config)) == hash(build_spec(config))
    assert build_spec(config, 64) != build_spec(config)


def test_mpt_slopes_are_the_powers_of_the_paper() -> None:
    """For a power of two the slopes are 2 ** (-8 / n * i); the largest exponent is bias_max."""
    assert mpt_slopes(4, 8) == (2**-2, 2**-4, 2**-6, 2**-8)
    assert mpt_slopes(2, 6) == (2**-3, 2**-6)
    assert mpt_slopes(3, 8) == (2**-4, 2**-8, 2**-2)


# Families of other packages


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def install(value: str) -> None:
        point = EntryPoint("mine", value, registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        registry._installed.cache_clear()

    yield install
    registry._installed.cache_clear()


OUT_OF_TREE = Family(("MyForCausalLM",), llama.spec, {}, ())


def test_an_installed_package_brings_a_family(
    install: Callable[[str], None], tiny_checkpoint: Make
) -> None:
    """An entry point of the group quire.models is found by its architectures."""
    import sys

    install("out_of_tree:OUT_OF_TREE")
    sys.modules["out_of_tree"] = sys.modules[__name__]
    try:
        config = {**read_config(tiny_checkpoint("llama")), "architectures": ["MyForCausalLM"]}
        assert family_of(config) == ("MyForCausalLM", OUT_OF_TREE)
        assert build_spec(config).num_layers == 2
        assert "MyForCausalLM" in supported_architectures()
    finally:
        del sys.modules["out_of_tree"]


@pytest.mark.parametrize(
    ("value", "message"), [("no.such.module:X", "could not be loaded"), ("json:loads", "must be")]
)
def test_a_broken_package_is_named(
    value: str, message: str, install: Callable[[str], None]
) -> None:
    """An entry point that does not load is an error with its name."""
    install(value)
    with pytest.raises(ModelLoadError, match=f"'mine'.*{message}"):
        supported_architectures()


_SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 304,
}


@pytest.mark.parametrize(
    "values",
    [
        *[{"head_dim": value} for value in ("x", 0, -1, 1.5, float("nan"), 10**12)],
        *[{"num_hidden_layers": value} for value in (10**6, 10**12, 10**30)],
        *[{"hidden_size": 10**30}, {"vocab_size": 10**30}, {"rms_norm_eps": float("nan")}],
        *[{"layer_types": value} for value in (5, -1, True, 1.5)],
        *[{"architectures": [value]} for value in ({}, [], 5)],
        *[{"rope_parameters": {"rope_theta": value}} for value in ("x", [], 10**400)],
        *[
            {"rope_parameters": value}
            for value in (
                {"rope_type": []},
                {"rope_type": "linear", "factor": "x"},
                {"rope_type": "linear", "factor": float("nan")},
                {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0},
                {"partial_rotary_factor": "x"},
            )
        ],
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_an_error_of_loading(values: dict[str, Any]) -> None:
    """Wrong types and sizes in config.json never surface as an error of Python's or torch's."""
    with pytest.raises(ModelLoadError):
        build_spec({**_SIZES, **values})
