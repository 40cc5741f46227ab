"""Linear: one (fused) projection, and LinearMethod: how its bytes are kept and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """The shape of ``y = x @ weight.T + bias``.

    Attributes
    ----------
    name
        Prefix of its parameters, e.g. ``layers.0.mlp.down``.
    in_features
        Width of ``x``.
    parts
        Name -> out features of each projection fused into this one, in order; the sum is the
        width of ``y``.
    bias
        Whether there is one.
    groups
        Groups of heads, for parts that are queries, keys and values.
    """

    name: str
    in_features: int
    parts: Mapping[str, int]
    bias: bool = False
    groups: int = 1

    @property
    def out_features(self) -> int:
        """Width of the result."""
        return sum(self.parts.values())


class LinearMethod(Protocol):
    """How a projection's weight is stored and applied; one per weight format."""

    def create(self, linear: Linear, weights: Weights) -> None:
        """Allocate the parameters of `linear`."""

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        """Return the function ``x[num_tokens, in_features] -> [num_tokens, out_features]``.

        Called once, when the parameters have their values.
        """

    def read(self, linear: Linear, weights: Weights) -> torch.Tensor:
        """Return a copy of the weight, ``[out_features, in_features]``, on the CPU."""


class DenseMethod:
    """Weights as they are: ``[out_features, in_features]`` in the model's dtype."""

    def create(self, linear: Linear, weights: Weights) -> None:
        """See `LinearMethod.create`."""
        parts = linear.parts if len(linear.parts) > 1 else None
        shape = (linear.out_features, linear.in_features)
        weights.create(f"{linear.name}.weight", shape, parts=parts, groups=linear.groups)
        if linear.bias:
            weights.create(f"{linear.name}.bias", shape[:1], parts=parts, groups=linear.groups)

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        """See `LinearMethod.bind`."""
        multiply = kernels.linear
        weight, bias = weights[f"{linear.name}.weight"], weights.get(f"{linear.name}.bias")

        def apply(x: torch.Tensor) -> torch.Tensor:
            return multiply(x, weight, bias)

        return apply

    def read(self, linear: Linear, weights: Weights) -> torch.Tensor:
        """See `LinearMethod.read`."""
        return weights[f"{linear.name}.weight"].to("cpu", copy=True)
