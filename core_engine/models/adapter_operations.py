"""AdapterOperations: a decoder's slots for adapters, computed operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.kernels.lora import AdapterSlots, Expand, ExpandSlice, LoraRows, Shrink
from quire.models.adapter import Adapter, EmbeddingDelta, LinearDelta
from quire.models.linear import Apply, Linear, LinearMethod
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend

_EMBEDDING = "embed"


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """What an adapter has beside its projections, on the decoder's device and in its type."""

    embedding: EmbeddingDelta | None
    embed_weight: torch.Tensor | None
    lm_head_weight: torch.Tensor | None


class AdapterOperations:
    """A fixed number of slots, and what a step does with the adapters in them.

    Parameters
    ----------
    num_slots
    linears
        The projections that adapters may change, by name; ``lm_head`` among them.
    weights
        The model's parameters.
    kernels
        The operations.

    Attributes
    ----------
    rows : LoraRows or None
        Which adapter each token of the running step belongs to, None where none does; read by
        what `method` binds.
    """

    def __init__(
        self, num_slots: int, linears: Mapping[str, Linear], weights: Weights, kernels: Backend
    ) -> None:
        self.rows: LoraRows | None = None
        self._weights = weights
        self._kernels = kernels
        self._placed: list[_Placed | None] = [None] * num_slots
        self._shrinks: dict[str, AdapterSlots[Shrink | None]] = {}
        self._expands: dict[str, AdapterSlots[Expand | None]] = {}
        for name in (_EMBEDDING, *linears):
            self._expands[name] = AdapterSlots([None] * num_slots)
        for name in linears:
            self._shrinks[name] = AdapterSlots([None] * num_slots)

    def method(self, method: LinearMethod) -> LinearMethod:
        """Return `method` with the adapters on top of what it binds."""
        return _AdaptedMethod(method, self)

    def changes(self, name: str) -> bool:
        """Whether adapters can change a projection."""
        return name in self._shrinks

    def bind(self, name: str, apply: Apply) -> Apply:
        """Return ``x -> apply(x)``, adapted in the rows that have an adapter.

        A projection that no adapter can change stays as it is.
        """
        if not self.changes(name):
            return apply
        shrink, expand = self._kernels.lora_shrink, self._kernels.lora_expand
        shrinks, expands = self._shrinks[name], self._expands[name]

        def adapted(x: torch.Tensor) -> torch.Tensor:
            y, rows = apply(x), self.rows
            if rows is not None:
                expand(y, shrink(x, shrinks, rows), expands, rows)
            return y

        return adapted

    def embed(self, ids: torch.Tensor, x: torch.Tensor) -> None:
        """Turn the embeddings of the step's tokens, in place, into the adapted ones."""
        if self.rows is None:
            return
        lookup = self._kernels.embedding
        gains: list[tuple[slice | torch.Tensor, torch.Tensor]] = []
        for slot, where in self.rows.groups:
            placed = self._placed[slot]
            if placed is not None and placed.embed_weight is not None:
                x[where] = lookup(ids[where], placed.embed_weight)
            if placed is not None and placed.embedding is not None:
                delta = placed.embedding
                gains.append((where, lookup(ids[where], delta.a).float() * delta.scale))
        if gains:
            max_rank = max(gain.shape[1] for _, gain in gains)
            shrunk = torch.zeros(len(ids), max_rank, dtype=torch.float32, device=x.device)
            for where, gain in gains:
                shrunk[where, : gain.shape[1]] = gain
            self._kernels.lora_expand(x, shrunk, self._expands[_EMBEDDING], self.rows)

    def head(self, hidden: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Turn the output matrix's product, in place, into the adapted ones.

        Parameters
        ----------
        hidden : Tensor[num_rows, embedding_size]
        logits : Tensor[num_rows, vocab_size], float32
            Changed.
        slots : Tensor[num_rows], int32, on the CPU
        """
        rows = LoraRows.of(slots, self._weights.device)
        if rows is None:
            return
        for slot, where in rows.groups:
            placed = self._placed[slot]
            if placed is not None and placed.lm_head_weight is not None:
                logits[where] = self._kernels.linear(hidden[where], placed.lm_head_weight).float()
        shrunk = self._kernels.lora_shrink(hidden, self._shrinks["lm_head"], rows)
        self._kernels.lora_expand(logits, shrunk, self._expands["lm_head"], rows)

    # -- what is in the slots --------------------------------------------------------------------

    def set(self, slot: int, adapter: Adapter | None) -> None:
        """Put an adapter into a slot, in place of what was there; None empties it."""
        shrinks: dict[str, Shrink] = {}
        expands: dict[str, Expand] = {}
        placed = None
        if adapter is not None:
            placed = self._place(adapter)
            for name, linear in adapter.linears.items():
                shrinks[name], expands[name] = self._place_linear(name, linear)
            if placed.embedding is not None:
                expands[_EMBEDDING] = Expand((ExpandSlice(0, 0, placed.embedding.b),))
        self._placed[slot] = placed
        for name, row in self._shrinks.items():
            row[slot] = shrinks.get(name)
        for name, column in self._expands.items():
            column[slot] = expands.get(name)

    def _place(self, adapter: Adapter) -> _Placed:
        device, dtype = self._weights.device, self._weights.dtype
        delta = adapter.embedding
        if delta is not None:
            delta = EmbeddingDelta(delta.a.to(device), delta.b.to(device), delta.scale)
        embed, head = adapter.embed_weight, adapter.lm_head_weight
        return _Placed(
            delta,
            None if embed is None else embed.to(device, dtype),
            None if head is None else head.to(device, dtype),
        )

    def _place_linear(self, name: str, delta: LinearDelta) -> tuple[Shrink, Expand]:
        device = self._weights.device
        offset = delta.bias
        model_bias = self._weights.get(f"{name}.bias")
        if delta.factor is not None and model_bias is not None:
            # The factor is for the product alone, and would multiply the model's bias as well.
            # Taking that off again lets any kernel add its bias where it is cheapest, and leaves
            # rows without an adapter as they are.
            rest = (1 - delta.factor) * model_bias.to("cpu", torch.float32)
            offset = rest if offset is None else offset + rest
        factor = None if delta.factor is None else delta.factor.to(device)
        slices = tuple(
            ExpandSlice(each.first_row, each.first_rank, each.b.to(device)) for each in delta.slices
        )
        return (
            Shrink(delta.a.to(device), delta.scales.to(device)),
            Expand(slices, factor, None if offset is None else offset.to(device)),
        )


class _AdaptedMethod:
    """A LinearMethod with adapters on top; they need nothing of how it keeps its weight."""

    def __init__(self, method: LinearMethod, adapters: AdapterOperations) -> None:
        self._method = method
        self._adapters = adapters

    def create(self, linear: Linear, weights: Weights) -> None:
        """See `LinearMethod.create`."""
        self._method.create(linear, weights)

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        """See `LinearMethod.bind`."""
        return self._adapters.bind(linear.name, self._method.bind(linear, weights, kernels))

    def stacked(self, linears: Sequence[Linear], weights: Weights) -> torch.Tensor | None:
        """See `StackingMethod.stacked`."""
        find = getattr(self._method, "stacked", None)
        if find is None or any(self._adapters.changes(linear.name) for linear in linears):
            return None
        found: torch.Tensor | None = find(linears, weights)
        return found

    def read(self, linear: Linear, weights: Weights) -> torch.Tensor:
        """See `LinearMethod.read`."""
        return self._method.read(linear, weights)
