"""Qwen3-MoE: Qwen3's shape, with a mixture of experts in place of MLPs."""

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
from quire.models.families.mixtures import MIXTURE_WEIGHTS, STACKED, qwen_mlps
from quire.models.family import Family, To
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Qwen3-MoE model; a sliding window, if it is used, is every layer's."""
    config = {"num_key_value_heads": 4, "sliding_window": 4096, **config, "layer_types": None}
    used = flag(config, "use_sliding_window", False) and config["sliding_window"] is not None
    kinds = ["sliding_attention" if used else "full_attention"]
    bias = flag(config, "attention_bias", False)
    return llama_like(
        config,
        max_model_len,
        layer_windows=windows(config, kinds * integer(config, "num_hidden_layers")),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        mlps=qwen_mlps(config, dense_size=6144, expert_size=768, count=128, per_token=8),
    )


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    spec=spec,
    weights={
        **LLAMA_WEIGHTS,
        **MIXTURE_WEIGHTS,
        "layers.{}.self_attn.q_norm": To("layers.{}.attention.q_norm"),
        "layers.{}.self_attn.k_norm": To("layers.{}.attention.k_norm"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
    stacked=STACKED,
)
