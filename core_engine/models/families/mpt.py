"""MPT: ALiBi, LayerNorm without bias, no bias anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ModelLoadError
from quire.models.alibi import mpt_slopes
from quire.models.families.common import flag, heads, integer, number, refuse
from quire.models.family import Family, To
from quire.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec


def spec(config: Mapping[str, Any], _max_model_len: int | None) -> DecoderSpec:
    """Describe an MPT model."""
    refuse(config, no_bias=True, logit_scale=None)
    options = config.get("attn_config") or {}
    if not isinstance(options, Mapping):
        raise ModelLoadError(f"attn_config in config.json is {options!r}; it must be an object")
    refuse(
        options,
        alibi=True,
        attn_type="multihead_attention",
        attn_uses_sequence_id=False,
        prefix_lm=False,
        qk_ln=False,
    )
    hidden_size, num_heads = integer(config, "d_model"), integer(config, "n_heads")
    sizes = heads({"hidden_size": hidden_size}, num_heads, num_heads)
    sizes["scale"] = number(options, "softmax_scale", sizes["scale"])
    norm = NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5))
    layer = LayerSpec(
        AttentionSpec(
            **sizes,
            alibi_slopes=mpt_slopes(num_heads, number(options, "alibi_bias_max", 8)),
            clip_qkv=options.get("clip_qkv") or None,
        ),
        MlpSpec(integer(config, "expansion_ratio", 4) * hidden_size, "gelu", gated=False),
        attention_norm=norm,
        mlp_norm=norm,
    )
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * integer(config, "n_layers"),
        final_norm=norm,
        max_position=integer(config, "max_seq_len", 2048),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
    )


FAMILY = Family(
    architectures=("MPTForCausalLM", "MptForCausalLM"),
    spec=spec,
    weights={
        "wte": To("embed"),
        "blocks.{}.norm_1": To("layers.{}.attention_norm"),
        "blocks.{}.attn.Wqkv": To("layers.{}.attention.qkv"),
        "blocks.{}.attn.out_proj": To("layers.{}.attention.out"),
        "blocks.{}.norm_2": To("layers.{}.mlp_norm"),
        "blocks.{}.ffn.up_proj": To("layers.{}.mlp.up"),
        "blocks.{}.ffn.down_proj": To("layers.{}.mlp.down"),
        "norm_f": To("final_norm"),
        "lm_head": To("lm_head"),
    },
    prefixes=("transformer.",),
)
