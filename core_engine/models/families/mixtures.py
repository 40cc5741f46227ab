"""What families with mixtures of experts share: their numbers, which layers have them, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import ModelLoadError
from quire.models.families.common import LLAMA_WEIGHTS, activation, flag, integer, refuse
from quire.models.family import To
from quire.models.spec import ExpertsSpec, MlpSpec

STACKED = ("experts.gate_up_proj", "experts.down_proj")
"""Tensors of three axes, in which transformers has the experts of a layer in memory."""

LLAMA_WITHOUT_MLP = {
    name: to for name, to in LLAMA_WEIGHTS.items() if not name.startswith("layers.{}.mlp.")
}
MIXTURE_WEIGHTS = {
    "layers.{}.mlp.gate": To("layers.{}.mlp.router"),
    "layers.{}.mlp.experts.{}.gate_up_proj": To("layers.{}.mlp.experts.{}.gate_up"),
    "layers.{}.mlp.experts.{}.gate_proj": To("layers.{}.mlp.experts.{}.gate_up", "gate"),
    "layers.{}.mlp.experts.{}.up_proj": To("layers.{}.mlp.experts.{}.gate_up", "up"),
    "layers.{}.mlp.experts.{}.down_proj": To("layers.{}.mlp.experts.{}.down"),
}

_MOST_EXPERTS = 4096
"""Of a layer. Each is a module of its own, so that many more would take all memory."""


def num_experts(config: Mapping[str, Any], default: int) -> int:
    """Return the number of experts, ``num_local_experts`` or ``num_experts``; it may be 0.

    Raises
    ------
    ModelLoadError
        It is no number, or one that makes no sense, or there are two.
    """
    given = {
        key: config[key]
        for key in ("num_local_experts", "num_experts")
        if config.get(key) is not None
    }
    for key, value in given.items():
        if type(value) is not int or value < 0:
            raise ModelLoadError(f"{key} in config.json is {value!r}; it must be 0 or more")
        if value > _MOST_EXPERTS:
            raise ModelLoadError(
                f"{key} in config.json is {value}; at most {_MOST_EXPERTS} makes sense"
            )
    if len(set(given.values())) > 1:
        words = " and ".join(f"{key} is {value}" for key, value in given.items())
        raise ModelLoadError(f"in config.json {words}; they mean the same")
    return next(iter(given.values()), default)


def experts(
    config: Mapping[str, Any],
    count: int,
    *,
    per_token: int,
    normalized: bool,
    shared_size: int | None = None,
) -> ExpertsSpec:
    """Describe a mixture of `count` experts.

    Parameters
    ----------
    config
    count
        From `num_experts`; not 0.
    per_token
        Experts of a token, for a configuration that does not say.
    normalized
        Whether a token's scores are made to sum to 1.
    shared_size
        Width of an expert for all tokens, which then has a gate; None: there is none.

    Raises
    ------
    ModelLoadError
        Tokens want more experts than there are.
    UnsupportedModelError
        Experts are chosen in a way that is not supported.
    """
    refuse(
        config, scoring_func="softmax", topk_method="greedy", n_group=1, routed_scaling_factor=1.0
    )
    per_token = integer(config, "num_experts_per_tok", per_token)
    if per_token > count:
        raise ModelLoadError(
            f"num_experts_per_tok in config.json is {per_token}; there are {count} experts"
        )
    return ExpertsSpec(
        count, per_token, normalized, shared_size=shared_size, shared_gate=shared_size is not None
    )


def qwen_mlps(
    config: Mapping[str, Any],
    *,
    dense_size: int,
    expert_size: int,
    count: int,
    per_token: int,
    shared_size: int | None = None,
) -> Sequence[MlpSpec]:
    """Describe each layer's MLP in Qwen's models, where some layers may have no experts.

    Parameters
    ----------
    config
    dense_size, expert_size, count, per_token, shared_size
        For a configuration that does not say; `shared_size` is None for models that have no shared
        expert.
    """
    act = activation(config, "hidden_act", "silu")
    count = num_experts(config, count)
    every = integer(config, "decoder_sparse_step", 1)
    num_layers = integer(config, "num_hidden_layers")
    dense = config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(
        type(each) is int and 0 <= each < num_layers for each in dense
    ):
        raise ModelLoadError(
            f"mlp_only_layers in config.json is {dense!r}; it must be a list of layers' numbers, "
            f"0 to {num_layers - 1}"
        )
    made = []
    for number in range(num_layers):
        if not count or number in dense or (number + 1) % every:
            made.append(MlpSpec(integer(config, "intermediate_size", dense_size), act))
            continue
        if shared_size is not None:
            shared_size = integer(config, "shared_expert_intermediate_size", shared_size)
        mixture = experts(
            config,
            count,
            per_token=per_token,
            normalized=flag(config, "norm_topk_prob", False),
            shared_size=shared_size,
        )
        size = integer(config, "moe_intermediate_size", expert_size)
        made.append(MlpSpec(size, act, experts=mixture))
    return made
