"""Falcon: the 7b layout (one key/value head), that of 40b, 180b and 11b (grouped), and ALiBi's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.alibi import bloom_slopes
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
    """Describe a Falcon model."""
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    grouped = flag(config, "new_decoder_architecture", False)
    one_kv_head = flag(config, "multi_query", True) and not grouped
    parallel = grouped or flag(config, "parallel_attn", True)
    num_kv_heads = 1 if one_kv_head else integer(config, "num_kv_heads", num_heads)
    sizes = heads(config, num_heads, num_kv_heads)
    alibi = flag(config, "alibi", False)
    bias = flag(config, "bias", False)
    norm = NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5), bias=True)
    has_mlp_norm = not parallel or (grouped and integer(config, "num_ln_in_parallel_attn", 2) == 2)
    # Falcon scales the score and its ALiBi bias together.
    slopes = tuple(slope * sizes["scale"] for slope in bloom_slopes(num_heads))
    layer = LayerSpec(
        AttentionSpec(
            **sizes,
            qkv_bias=bias,
            out_bias=bias,
            rotary=None if alibi else rotary(config, sizes["head_dim"], max_model_len),
            alibi_slopes=slopes if alibi else None,
        ),
        MlpSpec(
            integer(config, "ffn_hidden_size", 4 * hidden_size),
            activation(config, "activation", "gelu"),
            gated=False,
            bias=bias,
        ),
        attention_norm=norm,
        mlp_norm=norm if has_mlp_norm else None,
        residual="parallel" if parallel else "sequential",
    )
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * integer(config, "num_hidden_layers"),
        final_norm=norm,
        max_position=max_length(config, max_model_len),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
    )


FAMILY = Family(
    architectures=("FalconForCausalLM",),
    spec=spec,
    weights={
        "word_embeddings": To("embed"),
        "h.{}.input_layernorm": To("layers.{}.attention_norm"),
        "h.{}.ln_attn": To("layers.{}.attention_norm"),
        # With one key/value head there is one group, and the order is already queries, key, value.
        "h.{}.self_attention.query_key_value": To("layers.{}.attention.qkv", layout="grouped"),
        "h.{}.self_attention.dense": To("layers.{}.attention.out"),
        "h.{}.post_attention_layernorm": To("layers.{}.mlp_norm"),
        "h.{}.ln_mlp": To("layers.{}.mlp_norm"),
        "h.{}.mlp.dense_h_to_4h": To("layers.{}.mlp.up"),
        "h.{}.mlp.dense_4h_to_h": To("layers.{}.mlp.down"),
        "ln_f": To("final_norm"),
        "lm_head": To("lm_head"),
    },
    prefixes=("transformer.",),
    ignored=ROTARY_TENSORS,
)
