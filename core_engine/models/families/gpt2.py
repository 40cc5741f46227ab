"""GPT-2: learned positions, LayerNorm, weights stored ``[in, out]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.models.families.common import activation, flag, heads, integer, number, refuse
from quire.models.family import Family, To
from quire.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    LearnedPositions,
    MlpSpec,
    NormSpec,
)


def spec(config: Mapping[str, Any], _max_model_len: int | None) -> DecoderSpec:
    """Describe a GPT-2 model."""
    refuse(config, add_cross_attention=False)
    hidden_size, num_heads = integer(config, "n_embd"), integer(config, "n_head")
    attention = AttentionSpec(
        **heads({"hidden_size": hidden_size}, num_heads, num_heads), qkv_bias=True, out_bias=True
    )
    if not flag(config, "scale_attn_weights", True):
        attention = replace(attention, scale=1.0)
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx", False)
    norm = NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5), bias=True)
    mlp = MlpSpec(
        integer(config, "n_inner", 4 * hidden_size),
        activation(config, "activation_function", "gelu_new"),
        gated=False,
        bias=True,
    )
    layers = tuple(
        LayerSpec(
            replace(attention, scale=attention.scale / (index + 1)) if by_layer else attention,
            mlp,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for index in range(integer(config, "n_layer"))
    )
    max_position = integer(config, "n_positions", 1024)
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=layers,
        final_norm=norm,
        max_position=max_position,
        learned_positions=LearnedPositions(max_position),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
    )


FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    spec=spec,
    weights={
        "wte": To("embed"),
        "wpe": To("embed_positions"),
        "h.{}.ln_1": To("layers.{}.attention_norm"),
        "h.{}.attn.c_attn": To("layers.{}.attention.qkv", layout="transposed"),
        "h.{}.attn.c_proj": To("layers.{}.attention.out", layout="transposed"),
        "h.{}.ln_2": To("layers.{}.mlp_norm"),
        "h.{}.mlp.c_fc": To("layers.{}.mlp.up", layout="transposed"),
        "h.{}.mlp.c_proj": To("layers.{}.mlp.down", layout="transposed"),
        "ln_f": To("final_norm"),
        "lm_head": To("lm_head"),
    },
    prefixes=("transformer.",),
    # Causal masks that old checkpoints carry.
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)
