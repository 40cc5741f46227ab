"""Linear: one (fused) projection, and LinearMethod: how its bytes are kept and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from quire.models.cut import Cut
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.kernels.quantized import QuantizedWeight

Apply = Callable[[torch.Tensor], torch.Tensor]

Split = Literal["rows", "columns"]
"""How ranks share a projection: each has some outputs of every part; or some inputs, and what they
make of these is to be summed."""


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
    split
        How ranks share it, where there are several; None: each has all of it.
    own_rows
        Of each part, in order, the rows that this rank has, see `Cut`; None: all.
    own_columns
        The inputs that it has; None: all.
    """

    name: str
    in_features: int
    parts: Mapping[str, int]
    bias: bool = False
    groups: int = 1
    split: Split | None = None
    own_rows: tuple[range, ...] | None = None
    own_columns: range | None = None

    @property
    def out_features(self) -> int:
        """Width of the result, as a whole."""
        return sum(self.parts.values())

    @property
    def cut(self) -> Cut:
        """What this rank has of the weight."""
        shape = (self.out_features, self.in_features)
        parts = self.parts if len(self.parts) > 1 else {}
        return Cut(shape, parts, self.groups, self.own_rows, self.own_columns)

    def ungrouped_rows(self) -> torch.Tensor:
        """Where each row of the whole weight is when its rows lie ``"grouped"``."""
        rows = torch.arange(self.out_features).view(self.groups, -1)
        sizes = [size // self.groups for size in self.parts.values()]
        return torch.cat([each.reshape(-1) for each in rows.split_with_sizes(sizes, dim=1)])


class LinearMethod(Protocol):
    """How a projection's weight is stored and applied."""

    def create(self, linear: Linear, weights: Weights) -> None:
        """Allocate the parameters of `linear`."""

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        """Return the function ``x[num_tokens, in_features] -> [num_tokens, out_features]``.

        Called once, when the parameters have their values.
        """

    def read(self, linear: Linear, weights: Weights) -> torch.Tensor:
        """Return a copy of the weight, ``[out_features, in_features]``, on the CPU.

        In float32 where it is in codes.
        """


class StackingMethod(LinearMethod, Protocol):
    """A method that knows of weights that lie side by side; not every one does."""

    def stacked(self, linears: Sequence[Linear], weights: Weights) -> torch.Tensor | None:
        """Return plain weights, without biases, as one tensor.

        Returns
        -------
        Tensor[len(linears), out_features, in_features] or None
            None: they do not lie side by side, or more than a product is made with them.
        """


class WeightMethod:
    """By what the weight is: ``[out_features, in_features]`` in the model's dtype, or codes."""

    def create(self, linear: Linear, weights: Weights) -> None:
        """See `LinearMethod.create`."""
        cut = linear.cut
        weights.enter(f"{linear.name}.weight", cut)
        if linear.bias:
            weights.enter(f"{linear.name}.bias", replace(cut, shape=cut.shape[:1], columns=None))

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        """See `LinearMethod.bind`."""
        bias = weights.get(f"{linear.name}.bias")
        coded = weights.coded(f"{linear.name}.weight")
        if coded is None:
            return _bind_plain(weights[f"{linear.name}.weight"], bias, kernels)
        products: list[Apply] = []
        first = 0
        for piece in coded.pieces:
            end = first + (len(piece) if isinstance(piece, torch.Tensor) else piece.out_features)
            part = None if bias is None else bias[first:end]
            if isinstance(piece, torch.Tensor):
                products.append(_bind_plain(piece, part, kernels))
            else:
                products.append(_bind_codes(piece, part, kernels))
            first = end
        if len(products) == 1:
            return products[0]
        return lambda x: torch.cat([product(x) for product in products], dim=1)

    def stacked(self, linears: Sequence[Linear], weights: Weights) -> torch.Tensor | None:
        """See `StackingMethod.stacked`."""
        if any(f"{linear.name}.bias" in weights for linear in linears):
            return None
        return weights.stacked([f"{linear.name}.weight" for linear in linears])

    def read(self, linear: Linear, weights: Weights) -> torch.Tensor:
        """See `LinearMethod.read`."""
        coded = weights.coded(f"{linear.name}.weight")
        if coded is not None:
            return coded.read()
        return weights[f"{linear.name}.weight"].to("cpu", copy=True)


def _bind_plain(weight: torch.Tensor, bias: torch.Tensor | None, kernels: Backend) -> Apply:
    multiply = kernels.linear
    return lambda x: multiply(x, weight, bias)


def _bind_codes(weight: QuantizedWeight, bias: torch.Tensor | None, kernels: Backend) -> Apply:
    multiply = kernels.quantized_linear
    return lambda x: multiply(x, weight, bias)
