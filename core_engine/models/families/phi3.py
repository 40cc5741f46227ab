"""Phi-3, Phi-3.5 and Phi-4 (mini): Llama's shape, stored fused, with LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.models.families.common import LLAMA_WEIGHTS, ROTARY_TENSORS, integer, llama_like, windows
from quire.models.family import Family, To
from quire.models.spec import DecoderSpec


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Phi-3 model.

    Its LongRoPE has one set of factors for sequences up to the trained length and one for longer
    ones; which is used follows from `max_model_len` (see `quire.models.rotary.rotary_spec`).
    """
    rope = dict(config.get("rope_parameters") or {})
    if rope.get("rope_type") == "yarn":
        # The first Phi-3 checkpoints call it so; what they hold is LongRoPE's two sets of factors.
        rope["rope_type"] = "longrope"
    config = {**config, "rope_parameters": rope}
    kind = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
    kinds = [kind] * integer(config, "num_hidden_layers")
    return llama_like(config, max_model_len, layer_windows=windows(config, kinds), default_eps=1e-5)


FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    spec=spec,
    weights={
        **{name: to for name, to in LLAMA_WEIGHTS.items() if not to.part},
        "layers.{}.self_attn.qkv_proj": To("layers.{}.attention.qkv"),
        "layers.{}.mlp.gate_up_proj": To("layers.{}.mlp.gate_up"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
)
