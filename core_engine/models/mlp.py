"""The MLP of a layer, or the mixture of experts in its place: parameters, and what a step calls.

A mixture's experts are projections like any other, ``{mlp}.experts.{i}.gate_up`` and ``.down``, and
so is the expert that computes every token, ``{mlp}.shared.gate_up`` and ``.down``. Router and gate,
``{mlp}.router`` and ``{mlp}.shared_gate``, are plain parameters, whatever a `LinearMethod` does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quire.models.linear import Apply, Linear, LinearMethod
from quire.models.spec import ExpertsSpec, MlpSpec
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend

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
    here = {
        inner: bind_mlp(inner, one, hidden_size, method, weights, kernels)
        for inner, one in inner_mlps(name, spec).items()
    }
    experts = [here.get(f"{name}.experts.{number}") for number in range(mixture.num_experts)]
    shared = here.get(f"{name}.shared")
    router = weights[f"{name}.router.weight"]
    gate = weights.get(f"{name}.shared_gate.weight")
    per_token, normalized = mixture.per_token, mixture.normalized
    multiply, route, mix = kernels.linear, kernels.route, kernels.mix_experts

    def run(x: torch.Tensor) -> torch.Tensor:
        shares, chosen = route(multiply(x, router), per_token, normalized=normalized)
        mixed = mix(x, shares, chosen, experts)
        if shared is None:
            return mixed
        always = shared(x)
        if gate is not None:
            always = torch.sigmoid(multiply(x, gate)) * always
        return mixed + always

    return run
