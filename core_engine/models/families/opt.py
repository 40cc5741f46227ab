"""OPT (and Galactica): learned positions, LayerNorm; the 350m model norms after the residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import activation, flag, heads, integer
from quire.models.family import Family, To
from quire.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    LearnedPositions,
    MlpSpec,
    NormSpec,
)

_ROWS_BEFORE_POSITION_0 = 2


def spec(config: Mapping[str, Any], _max_model_len: int | None) -> DecoderSpec:
    """Describe an OPT model."""
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    bias = flag(config, "enable_bias", True)
    affine = flag(config, "layer_norm_elementwise_affine", True)
    norm_before = flag(config, "do_layer_norm_before", True)
    norm = NormSpec("layer", 1e-5, weight=affine, bias=affine)
    layer = LayerSpec(
        AttentionSpec(**heads(config, num_heads, num_heads), qkv_bias=bias, out_bias=bias),
        MlpSpec(
            integer(config, "ffn_dim"),
            activation(config, "activation_function", "relu"),
            gated=False,
            bias=bias,
        ),
        attention_norm=norm,
        mlp_norm=norm,
        residual="sequential" if norm_before else "post",
    )
    has_final_norm = norm_before and not flag(config, "_remove_final_layer_norm", False)
    max_position = integer(config, "max_position_embeddings", 2048)
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * integer(config, "num_hidden_layers"),
        final_norm=norm if has_final_norm else None,
        max_position=max_position,
        embedding_size=integer(config, "word_embed_proj_dim", hidden_size),
        learned_positions=LearnedPositions(max_position, offset=_ROWS_BEFORE_POSITION_0),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
    )


FAMILY = Family(
    architectures=("OPTForCausalLM",),
    spec=spec,
    weights={
        "embed_tokens": To("embed"),
        "embed_positions": To("embed_positions"),
        "project_in": To("project_in"),
        "project_out": To("project_out"),
        "layers.{}.self_attn_layer_norm": To("layers.{}.attention_norm"),
        "layers.{}.self_attn.q_proj": To("layers.{}.attention.qkv", "q"),
        "layers.{}.self_attn.k_proj": To("layers.{}.attention.qkv", "k"),
        "layers.{}.self_attn.v_proj": To("layers.{}.attention.qkv", "v"),
        "layers.{}.self_attn.out_proj": To("layers.{}.attention.out"),
        "layers.{}.final_layer_norm": To("layers.{}.mlp_norm"),
        "layers.{}.fc1": To("layers.{}.mlp.up"),
        "layers.{}.fc2": To("layers.{}.mlp.down"),
        "final_layer_norm": To("final_norm"),
        "lm_head": To("lm_head"),
    },
    prefixes=("model.decoder.", "decoder."),
)
