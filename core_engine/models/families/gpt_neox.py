"""GPT-NeoX and Pythia: partial rotary embedding, attention and MLP side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import (
    ROTARY_TENSORS,
    activation,
    flag,
    heads,
    integer,
    number,
    rotary,
)
from quire.models.family import Family, To
from quire.models.hf_config import max_length
from quire.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a GPT-NeoX model."""
    num_heads = integer(config, "num_attention_heads")
    sizes = heads(config, num_heads, num_heads)
    bias = flag(config, "attention_bias", True)
    norm = NormSpec("layer", number(config, "layer_norm_eps", 1e-5), bias=True)
    layer = LayerSpec(
        AttentionSpec(
            **sizes,
            qkv_bias=bias,
            out_bias=bias,
            rotary=rotary(config, sizes["head_dim"], max_model_len, default_partial=0.25),
        ),
        MlpSpec(
            integer(config, "intermediate_size"),
            activation(config, "hidden_act", "gelu"),
            gated=False,
            bias=True,
        ),
        attention_norm=norm,
        mlp_norm=norm,
        residual="parallel" if flag(config, "use_parallel_residual", True) else "sequential",
    )
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        layers=(layer,) * integer(config, "num_hidden_layers"),
        final_norm=norm,
        max_position=max_length(config, max_model_len),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
    )


FAMILY = Family(
    architectures=("GPTNeoXForCausalLM",),
    spec=spec,
    weights={
        "embed_in": To("embed"),
        "layers.{}.input_layernorm": To("layers.{}.attention_norm"),
        "layers.{}.attention.query_key_value": To("layers.{}.attention.qkv", layout="grouped"),
        "layers.{}.attention.dense": To("layers.{}.attention.out"),
        "layers.{}.post_attention_layernorm": To("layers.{}.mlp_norm"),
        "layers.{}.mlp.dense_h_to_4h": To("layers.{}.mlp.up"),
        "layers.{}.mlp.dense_4h_to_h": To("layers.{}.mlp.down"),
        "final_layer_norm": To("final_norm"),
        "embed_out": To("lm_head"),
        "lm_head": To("lm_head"),
    },
    prefixes=("gpt_neox.",),
    # Causal masks that old checkpoints carry.
    ignored=(*ROTARY_TENSORS, r"\.attention\.(bias|masked_bias)$"),
)
