"""LoraOperations: the part of a backend that computes with LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from quire.kernels.lora import Expand, LoraRows, Shrink


class LoraOperations(Protocol):
    """Low-rank updates (Hu et al., arXiv:2106.09685) of rows that belong to different adapters.

    Many adapters, of any ranks, are computed in one batch as in Punica (Chen et al.,
    arXiv:2310.18547). The adapters of one projection are a sequence by place; None is an adapter
    that leaves the projection as it is. The sequence is the same object in every step, its entries
    change between steps; in an `AdapterSlots` a backend keeps what it has made of them. The rules
    of `quire.kernels.interface` hold here as well; matrices may be of another floating-point type
    than the rows.
    """

    def lora_shrink(
        self, x: torch.Tensor, adapters: Sequence[Shrink | None], rows: LoraRows
    ) -> torch.Tensor:
        """Compute ``scales * (x @ a.T)``, each row with its own adapter.

        Parameters
        ----------
        x : Tensor[num_tokens, in_features]
        adapters : sequence of (Shrink or None)
            By place; only those that have rows are looked at.
        rows : LoraRows
            Of ``num_tokens`` rows.

        Returns
        -------
        Tensor[num_tokens, max_rank], float32
            ``max_rank`` is the highest rank among the adapters that have rows, 0 if none has any.
            Columns past the rank of a row's adapter are 0, and so are rows without an adapter.
        """

    def lora_expand(
        self,
        y: torch.Tensor,
        shrunk: torch.Tensor,
        adapters: Sequence[Expand | None],
        rows: LoraRows,
    ) -> None:
        """Turn a projection's result, in place, into that of the adapted projection.

        A row becomes ``factor * (y + gain) + offset`` by its own adapter, where ``gain`` is
        ``shrunk[first_rank : first_rank + rank] @ b.T`` in the outputs of each slice and 0
        elsewhere. It is computed in float32 and rounded to the type of `y` once, at the end.
        Rows without an adapter keep their bits.

        Parameters
        ----------
        y : Tensor[num_tokens, out_features]
            Changed.
        shrunk : Tensor[num_tokens, max_rank], float32
            From `lora_shrink`, or of the same form.
        adapters : sequence of (Expand or None)
            By place; only those that have rows are looked at.
        rows : LoraRows
            As for `lora_shrink`.
        """
