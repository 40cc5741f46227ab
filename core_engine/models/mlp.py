"""The MLP of a layer, or the mixture of experts in its place: parameters, and what a step calls.

A mixture's experts are projections like any other, ``{mlp}.experts.{i}.gate_up`` and ``.down``, and
so is the expert that computes every token, ``{mlp}.shared.gate_up`` and ``.down``. Router and gate,
``{mlp}.router`` and ``{mlp}.shared_gate``, are plain parameters, whatever a `LinearMethod` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quire.models.linear import Apply, Linear, LinearMethod
from quire.models.spec import ExpertsSpec, MlpSpec
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend

_Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x, weights, chosen) -> [num_tokens, hidden_size]``, see `ExpertOperations.mix_experts`."""

_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a projection, by its name, is computed with the rows alone that chose its expert."""
    return _EXPERT.search(name) is not None


def inner_mlps(name: str, spec: MlpSpec) -> dict[str, MlpSpec]:
    """Return the single MLPs of a layer by their names: itself, or the experts and the shared one.

    Of the experts, those that are here.

    Parameters
    ----------
    name
        ``layers.0.mlp``.
    spec
    """
    if spec.experts is None:
        return {name: spec}
    one = replace(spec, experts=None)
    held = spec.experts.held
    if held is None:
        held = range(spec.experts.num_experts)
    mlps = {f"{name}.experts.{number}": one for number in held}
    if spec.experts.shared_size is not None:
        mlps[f"{name}.shared"] = replace(one, intermediate_size=spec.experts.shared_size)
    return mlps


def mlp_linears(name: str, spec: MlpSpec, hidden_size: int) -> list[Linear]:
    """Return the (fused) projection up and the one down; of a mixture, those of each expert."""
    if spec.experts is not None:
        return [
            linear
            for inner, one in inner_mlps(name, spec).items()
            for linear in mlp_linears(inner, one, hidden_size)
        ]
    size = spec.intermediate_size
    if spec.gated:
        parts = {"gate": size, "up": size}
        up = Linear(f"{name}.gate_up", hidden_size, parts, spec.bias, split="rows")
    else:
        up = Linear(f"{name}.up", hidden_size, {"up": size}, spec.bias, split="rows")
    return [up, Linear(f"{name}.down", size, {"down": hidden_size}, spec.bias, split="columns")]


def create_router(name: str, spec: MlpSpec, hidden_size: int, weights: Weights) -> None:
    """Allocate what a mixture has besides projections."""
    if spec.experts is None:
        return
    weights.create(f"{name}.router.weight", (spec.experts.num_experts, hidden_size))
    if spec.experts.shared_gate:
        weights.create(f"{name}.shared_gate.weight", (1, hidden_size))


def _expert_linears(name: str, spec: MlpSpec, hidden_size: int) -> list[list[Linear]]:
    """Return the projections up of a mixture's experts that are here, and those down."""
    each = [
        mlp_linears(inner, one, hidden_size)
        for inner, one in inner_mlps(name, spec).items()
        if is_expert(f"{inner}.")
    ]
    return [list(alike) for alike in zip(*each, strict=True)]


def stack_experts(name: str, spec: MlpSpec, hidden_size: int, weights: Weights) -> None:
    """Have the weights of a mixture's experts lie side by side, for kernels that compute all.

    To be called when the parameters have been entered, and have no values yet.
    """
    if spec.experts is not None and spec.gated and not spec.bias:
        for alike in _expert_linears(name, spec, hidden_size):
            weights.stack([f"{linear.name}.weight" for linear in alike])


def stacked_experts(
    name: str,
    spec: MlpSpec,
    hidden_size: int,
    method: LinearMethod,
    weights: Weights,
    kernels: Backend,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the weights of a mixture's experts, where one operation is to compute with all.

    Returns
    -------
    tuple of Tensor, or None
        ``[num_held, 2 * inner_size, hidden_size]`` and ``[num_held, hidden_size, inner_size]``;
        None: they do not lie side by side, or the kernels have no such operation.
    """
    find = getattr(method, "stacked", None)
    if find is None or not hasattr(kernels, "mix_stacked_experts"):
        return None
    if not spec.gated or spec.bias:
        return None
    found = [find(alike, weights) for alike in _expert_linears(name, spec, hidden_size)]
    if len(found) != 2 or any(each is None for each in found):
        return None
    return found[0], found[1]


def bind_mlp(
    name: str,
    spec: MlpSpec,
    hidden_size: int,
    method: LinearMethod,
    weights: Weights,
    kernels: Backend,
) -> Apply:
    """Return ``x -> mlp(x)``."""
    if spec.experts is not None:
        return _bind_mixture(name, spec, spec.experts, hidden_size, method, weights, kernels)
    up, down = (
        method.bind(linear, weights, kernels) for linear in mlp_linears(name, spec, hidden_size)
    )
    activate = kernels.act_and_mul if spec.gated else kernels.activation
    kind = spec.activation
    return lambda x: down(activate(up(x), kind))


def _bind_mixture(
    name: str,
    spec: MlpSpec,
    mixture: ExpertsSpec,
    hidden_size: int,
    method: LinearMethod,
    weights: Weights,
    kernels: Backend,
) -> Apply:
    stacks = stacked_experts(name, spec, hidden_size, method, weights, kernels)
    here = {
        inner: bind_mlp(inner, one, hidden_size, method, weights, kernels)
        for inner, one in inner_mlps(name, spec).items()
        if stacks is None or not is_expert(f"{inner}.")
    }
    shared = here.get(f"{name}.shared")
    router = weights[f"{name}.router.weight"]
    gate = weights.get(f"{name}.shared_gate.weight")
    per_token, normalized = mixture.per_token, mixture.normalized
    multiply, route = kernels.linear, kernels.route
    if stacks is not None:
        mix = _all_at_once(*stacks, spec.activation, mixture.held, kernels)
    else:
        mix = _one_by_one(
            [here.get(f"{name}.experts.{number}") for number in range(mixture.num_experts)],
            kernels,
        )

    def run(x: torch.Tensor) -> torch.Tensor:
        shares, chosen = route(multiply(x, router), per_token, normalized=normalized)
        mixed = mix(x, shares, chosen)
        if shared is None:
            return mixed
        always = shared(x)
        if gate is not None:
            always = torch.sigmoid(multiply(x, gate)) * always
        return mixed + always

    return run


def _one_by_one(experts: list[Apply | None], kernels: Backend) -> _Mix:
    mix = kernels.mix_experts
    return lambda x, shares, chosen: mix(x, shares, chosen, experts)


def _all_at_once(
    gate_up: torch.Tensor, down: torch.Tensor, kind: str, held: range | None, kernels: Backend
) -> _Mix:
    mix, first = kernels.mix_stacked_experts, 0 if held is None else held.start
    return lambda x, shares, chosen: mix(x, shares, chosen, gate_up, down, kind, first_expert=first)
