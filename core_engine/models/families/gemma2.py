"""Gemma 2: norms before and after, soft-caps, a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.models.families.common import (
    LLAMA_WEIGHTS,
    ROTARY_TENSORS,
    activation,
    flag,
    integer,
    llama_like,
    number,
    refuse,
    windows,
)
from quire.models.family import Family, To
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Gemma 2 model."""
    refuse(config, use_bidirectional_attention=False)
    config = {
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        **config,
    }
    kinds = ("sliding_attention", "full_attention")
    layer_kinds = [kinds[i % 2] for i in range(integer(config, "num_hidden_layers"))]
    bias = flag(config, "attention_bias", False)
    plain = llama_like(
        {**config, "hidden_act": "silu"},
        max_model_len,
        layer_windows=windows(config, layer_kinds),
        qkv_bias=bias,
        out_bias=bias,
        default_head_dim=256,
    )
    norm = replace(plain.layers[0].attention_norm, weight_offset=1.0)
    kind = activation(config, "hidden_activation", config.get("hidden_act") or "gelu_pytorch_tanh")
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention,
                scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
                softcap=config["attn_logit_softcapping"],
            ),
            mlp=replace(layer.mlp, activation=kind),
            attention_norm=norm,
            attention_post_norm=norm,
            mlp_norm=norm,
            mlp_post_norm=norm,
        )
        for layer in plain.layers
    )
    return replace(
        plain,
        layers=layers,
        final_norm=norm,
        embedding_scale=plain.hidden_size**0.5,
        logits_softcap=config["final_logit_softcapping"],
    )


FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    spec=spec,
    weights={
        **LLAMA_WEIGHTS,
        "layers.{}.post_attention_layernorm": To("layers.{}.attention_post_norm"),
        "layers.{}.pre_feedforward_layernorm": To("layers.{}.mlp_norm"),
        "layers.{}.post_feedforward_layernorm": To("layers.{}.mlp_post_norm"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
