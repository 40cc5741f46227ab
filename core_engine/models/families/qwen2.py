"""Qwen2 and Qwen2.5: Llama's shape, with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import (
    LLAMA_WEIGHTS,
    ROTARY_TENSORS,
    flag,
    integer,
    llama_like,
    windows,
)
from quire.models.family import Family
from quire.models.spec import DecoderSpec


def qwen_windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window: those from ``max_window_layers`` on, if it is used."""
    num_layers = integer(config, "num_hidden_layers")
    config = {"sliding_window": 4096, **config}
    if not flag(config, "use_sliding_window", False) or config["sliding_window"] is None:
        return [None] * num_layers
    first = config.get("max_window_layers", 28)
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    return windows(config, kinds)


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Qwen2 model."""
    return llama_like(config, max_model_len, layer_windows=qwen_windows(config), qkv_bias=True)


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    spec=spec,
    weights=LLAMA_WEIGHTS,
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
