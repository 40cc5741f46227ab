"""Llama 2, 3, 3.1, 3.2 and what shares their architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import (
    LLAMA_WEIGHTS,
    ROTARY_TENSORS,
    flag,
    llama_like,
    windows,
)
from quire.models.family import Family
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Llama model."""
    bias = flag(config, "attention_bias", False)
    return llama_like(
        config,
        max_model_len,
        layer_windows=windows(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


FAMILY = Family(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    spec=spec,
    weights=LLAMA_WEIGHTS,
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
