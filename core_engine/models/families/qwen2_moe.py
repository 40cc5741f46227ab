"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's shape, with many experts and one that every token has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ModelLoadError, UnsupportedModelError
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


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window: of those listed or, if it is used, of every second."""
    used = flag(config, "use_sliding_window", False)
    first = config.get("max_window_layers")
    first = 28 if first is None else first
    if type(first) is not int:
        raise ModelLoadError(f"max_window_layers in config.json is {first!r}; it must be a number")
    kinds = [
        "sliding_attention" if used and number % 2 == 0 and number < first else "full_attention"
        for number in range(integer(config, "num_hidden_layers"))
    ]
    found = (
        windows({"sliding_window": 4096, **config}, kinds)
        if used
        else windows({**config, "sliding_window": 1}, kinds)
    )
    if not used and any(found):
        raise UnsupportedModelError(
            "use_sliding_window in config.json is false, and layer_types has 'sliding_attention'; "
            "only 'full_attention' is supported then"
        )
    return found


def spec(config: Mapping[str, Any], max_model_len: int | None) -> DecoderSpec:
    """Describe a Qwen2-MoE model."""
    config = {"num_key_value_heads": 16, **config}
    return llama_like(
        config,
        max_model_len,
        layer_windows=_windows(config),
        qkv_bias=flag(config, "qkv_bias", True),
        mlps=qwen_mlps(
            config, dense_size=5632, expert_size=1408, count=60, per_token=4, shared_size=5632
        ),
    )


FAMILY = Family(
    architectures=("Qwen2MoeForCausalLM",),
    spec=spec,
    weights={
        **LLAMA_WEIGHTS,
        **MIXTURE_WEIGHTS,
        "layers.{}.mlp.shared_expert.gate_proj": To("layers.{}.mlp.shared.gate_up", "gate"),
        "layers.{}.mlp.shared_expert.up_proj": To("layers.{}.mlp.shared.gate_up", "up"),
        "layers.{}.mlp.shared_expert.down_proj": To("layers.{}.mlp.shared.down"),
        "layers.{}.mlp.shared_expert_gate": To("layers.{}.mlp.shared_gate"),
    },
    prefixes=("model.",),
    ignored=ROTARY_TENSORS,
    stacked=STACKED,
)
