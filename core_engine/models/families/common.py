"""What family tables share: reading a configuration, and the Llama shape that many follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.models.family import To
from quire.models.hf_config import max_length
from quire.models.rotary import rotary_spec
from quire.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    RotarySpec,
)

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

LLAMA_WEIGHTS = {
    "embed_tokens": To("embed"),
    "layers.{}.input_layernorm": To("layers.{}.attention_norm"),
    "layers.{}.self_attn.q_proj": To("layers.{}.attention.qkv", "q"),
    "layers.{}.self_attn.k_proj": To("layers.{}.attention.qkv", "k"),
    "layers.{}.self_attn.v_proj": To("layers.{}.attention.qkv", "v"),
    "layers.{}.self_attn.o_proj": To("layers.{}.attention.out"),
    "layers.{}.post_attention_layernorm": To("layers.{}.mlp_norm"),
    "layers.{}.mlp.gate_proj": To("layers.{}.mlp.gate_up", "gate"),
    "layers.{}.mlp.up_proj": To("layers.{}.mlp.gate_up", "up"),
    "layers.{}.mlp.down_proj": To("layers.{}.mlp.down"),
    "norm": To("final_norm"),
    "lm_head": To("lm_head"),
}
"""Module names that Llama and its many relatives share."""

_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers")

ROTARY_TENSORS = (r"\.rotary_emb\.inv_freq$",)
"""Frequencies that older checkpoints carry; they follow from the configuration."""


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer of the configuration; required where there is no default.

    Raises
    ------
    ModelLoadError
        It is missing or no positive integer.
    """
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ModelLoadError(f"{key} in config.json is {value!r}; it must be a positive integer")
    most = _MOST_LAYERS if key in _LAYER_KEYS else _LARGEST
    if value > most:
        raise ModelLoadError(f"{key} in config.json is {value}; at most {most} makes sense")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of the configuration.

    Raises
    ------
    ModelLoadError
        It is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelLoadError(f"{key} in config.json is {value!r}; it must be a finite number")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a truth value of the configuration.

    Raises
    ------
    ModelLoadError
        It is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelLoadError(f"{key} in config.json is {value!r}; it must be true or false")
    return value


def activation(config: Mapping[str, Any], key: str, default: str) -> str:
    """Return the kernel's name of an activation function.

    Raises
    ------
    UnsupportedModelError
        It is unknown.
    """
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{key} in config.json is {name!r}; supported are: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def refuse(config: Mapping[str, Any], **accepted: object) -> None:
    """Refuse a configuration with a value that would change the model in an unsupported way.

    `accepted` gives, for each key, the only value that is supported (as is null or no value).

    Raises
    ------
    UnsupportedModelError
        A key has another value.
    """
    for key, value in accepted.items():
        if config.get(key) is not None and config[key] != value:
            raise UnsupportedModelError(
                f"{key} in config.json is {config[key]!r}; only {value!r} is supported"
            )


def heads(
    config: Mapping[str, Any], num_heads: int, num_kv_heads: int, head_dim: int | None = None
) -> dict[str, Any]:
    """Return the sizes of `AttentionSpec`, and the usual scale, having checked them.

    Raises
    ------
    ModelLoadError
        They do not divide each other.
    """
    if head_dim is None:
        hidden_size = integer(config, "hidden_size")
        if hidden_size % num_heads:
            raise ModelLoadError(
                f"hidden_size {hidden_size} is no multiple of the {num_heads} attention heads"
            )
        head_dim = hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"the number of attention heads {num_heads} is no multiple of the number of "
            f"key/value heads {num_kv_heads}"
        )
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
    }


def rotary(
    config: Mapping[str, Any],
    head_dim: int,
    max_model_len: int | None,
    *,
    default_partial: float = 1.0,
    max_position: int | None = None,
) -> RotarySpec:
    """Return the rotary embedding of a configuration; see `quire.models.rotary.rotary_spec`."""
    parameters = dict(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModelError(
            "rope_parameters in config.json differ from layer to layer, which is not supported "
            "for this architecture"
        )
    parameters.setdefault("rope_theta", 10_000.0)
    parameters.setdefault("partial_rotary_factor", default_partial)
    return rotary_spec(
        parameters,
        head_dim=head_dim,
        max_position=max_position or integer(config, "max_position_embeddings", 2048),
        max_model_len=max_model_len,
    )


def windows(
    config: Mapping[str, Any], layer_types: Sequence[str] | None = None
) -> list[int | None]:
    """Return each layer's sliding window, by the kinds of layers that a configuration lists.

    `layer_types` is for a configuration that lists none; None: no layer has a window.

    Raises
    ------
    ModelLoadError
        There is not one kind per layer.
    UnsupportedModelError
        A kind is unknown.
    """
    num_layers = integer(config, "num_hidden_layers")
    given = config.get("layer_types") or layer_types or ["full_attention"] * num_layers
    if len(given) != num_layers:
        raise ModelLoadError(
            f"layer_types in config.json lists {len(given)} layers; num_hidden_layers is "
            f"{num_layers}"
        )
    made: list[int | None] = []
    for kind in given:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"layer_types in config.json has {kind!r}; supported are: "
                "full_attention, sliding_attention"
            )
        made.append(integer(config, "sliding_window") if kind == "sliding_attention" else None)
    return made


def llama_like(
    config: Mapping[str, Any],
    max_model_len: int | None,
    *,
    layer_windows: Sequence[int | None] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    default_head_dim: int | None = None,
    default_eps: float = 1e-6,
    mlps: Sequence[MlpSpec] | None = None,
) -> DecoderSpec:
    """Describe a model of Llama's shape: RMS norms before, rotary, a gated MLP.

    Parameters
    ----------
    config, max_model_len
        As in `quire.models.family.Family.spec`.
    layer_windows
        Each layer's sliding window; None: none has one.
    qkv_bias, out_bias, mlp_bias
        Which projections have biases.
    qk_norm
        Whether queries and keys are normed head by head.
    default_head_dim, default_eps
        For a configuration that does not say.
    mlps
        Each layer's MLP; None: all have the one that the configuration describes.
    """
    num_heads = integer(config, "num_attention_heads")
    head_dim = default_head_dim
    if config.get("head_dim") is not None:
        head_dim = integer(config, "head_dim")
    sizes = heads(config, num_heads, integer(config, "num_key_value_heads", num_heads), head_dim)
    norm = NormSpec("rms", number(config, "rms_norm_eps", default_eps))
    rope = rotary(config, sizes["head_dim"], max_model_len)
    num_layers = integer(config, "num_hidden_layers")
    if mlps is None:
        mlp = MlpSpec(
            integer(config, "intermediate_size"),
            activation(config, "hidden_act", "silu"),
            bias=mlp_bias,
        )
        mlps = [mlp] * num_layers
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                **sizes,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                rotary=rope,
                sliding_window=window,
                qk_norm=norm if qk_norm else None,
            ),
            mlp,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for window, mlp in zip(layer_windows or [None] * num_layers, mlps, strict=True)
    )
    return DecoderSpec(
        architecture=config["architectures"][0],
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        layers=layers,
        final_norm=norm,
        max_position=max_length(config, max_model_len),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
    )
