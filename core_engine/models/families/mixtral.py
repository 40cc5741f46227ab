"""Mixtral: Mistral's shape, with eight experts in place of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ModelLoadError
from quire.models.families.common import ROTARY_TENSORS, activation, integer, llama_like, windows
from quire.models.families.mixtures import (
    LLAMA_WITHOUT_MLP,
    MIXTURE_WEIGHTS,
    STACKED,
    experts,
    num_experts,
)
from quire.models.family import Family, To
from quire.models.spec import DecoderSpec, MlpSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Mixtral model."""
    rope = {"rope_theta": 1e6, **(config.get("rope_parameters") or {})}
    config = {"num_key_value_heads": 8, **config, "rope_parameters": rope}
    count = num_experts(config, 8)
    if not count:
        raise ModelLoadError("num_local_experts in config.json is 0; it must be at least 1")
    mlp = MlpSpec(
        integer(config, "intermediate_size"),
        activation(config, "hidden_act", "silu"),
        experts=experts(config, count, per_token=2, normalized=True),
    )
    num_layers = integer(config, "num_hidden_layers")
    kind = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
    return llama_like(
        config,
        max_model_len,
        layer_windows=windows(config, [kind] * num_layers),
        mlps=[mlp] * num_layers,
        default_eps=1e-5,
    )


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    spec=spec,
    weights={
        **LLAMA_WITHOUT_MLP,
        **MIXTURE_WEIGHTS,
        # What files have; the names above are those in memory.
        "layers.{}.block_sparse_moe.gate": To("layers.{}.mlp.router"),
        "layers.{}.block_sparse_moe.experts.{}.w1": To("layers.{}.mlp.experts.{}.gate_up", "gate"),
        "layers.{}.block_sparse_moe.experts.{}.w3": To("layers.{}.mlp.experts.{}.gate_up", "up"),
        "layers.{}.block_sparse_moe.experts.{}.w2": To("layers.{}.mlp.experts.{}.down"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
    stacked=STACKED,
)
