"""Qwen3, dense: Llama's shape, with a norm on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import LLAMA_WEIGHTS, ROTARY_TENSORS, flag, llama_like
from quire.models.families.qwen2 import qwen_windows
from quire.models.family import Family, To
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Qwen3 model."""
    bias = flag(config, "attention_bias", False)
    return llama_like(
        config,
        max_model_len,
        layer_windows=qwen_windows(config),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        default_head_dim=128,
    )


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    spec=spec,
    weights={
        **LLAMA_WEIGHTS,
        "layers.{}.self_attn.q_norm": To("layers.{}.attention.q_norm"),
        "layers.{}.self_attn.k_norm": To("layers.{}.attention.k_norm"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
