"""Mistral: Llama's shape, with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import LLAMA_WEIGHTS, ROTARY_TENSORS, integer, llama_like, windows
from quire.models.family import Family
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Mistral model; a configuration without ``sliding_window`` has one of 4096."""
    config = {"sliding_window": 4096, "num_key_value_heads": 8, **config}
    kind = "full_attention" if config["sliding_window"] is None else "sliding_attention"
    kinds = [kind] * integer(config, "num_hidden_layers")
    return llama_like(config, max_model_len, layer_windows=windows(config, kinds))


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    spec=spec,
    weights=LLAMA_WEIGHTS,
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
