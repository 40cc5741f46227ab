"""Workspace: where the keys and values of a group are gathered, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.kv_rows import is_coded
from quire.kernels.reference.cache import decode_rows


@dataclass(slots=True, eq=False)
class Workspace:
    """Memory for the keys and values of one group, and the views of it that attention reads.

    Layers use it in turn: memory fresh from the system costs more than what is written to it.

    Attributes
    ----------
    key, value : Tensor[num_seqs, num_kv_heads, max_kv_len, head_dim]
        What the last call of `gather` brought, in the type it is computed in.
    """

    key: torch.Tensor
    value: torch.Tensor
    _rows: tuple[torch.Tensor, torch.Tensor]
    _wide_rows: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(
        cls,
        buffers: tuple[torch.Tensor, torch.Tensor],
        wide_buffers: tuple[torch.Tensor, torch.Tensor] | None,
        shape: tuple[int, int, int, int],
    ) -> Workspace:
        """Make one for keys of `shape`, `[num_seqs, max_kv_len, num_kv_heads, head_dim]`.

        Parameters
        ----------
        buffers : (Tensor[num_slots, num_kv_heads * row_width], ...)
            For keys and for values, with ``num_slots >= num_seqs * max_kv_len``, of the caches'
            type; shared by the groups of a step.
        wide_buffers : (Tensor[num_slots, num_kv_heads * head_dim], ...) or None
            Of the type that is computed in, where that is not the caches' own; never of codes.
        shape : tuple of int
        """
        num_rows = shape[0] * shape[1]
        rows = (buffers[0][:num_rows], buffers[1][:num_rows])
        wide_rows = None
        if wide_buffers is not None:
            wide_rows = (wide_buffers[0][:num_rows], wide_buffers[1][:num_rows])
        key, value = (each.view(shape).transpose(1, 2) for each in wide_rows or rows)
        return cls(key, value, rows, wide_rows)

    def gather(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Fill it from a layer's caches, `[num_slots, num_kv_heads * row_width]` each."""
        if is_coded(keys.dtype):
            self._decode(keys, slots, self._rows[0], self.key)
            self._decode(values, slots, self._rows[1], self.value)
            return
        torch.index_select(keys, 0, slots, out=self._rows[0])
        torch.index_select(values, 0, slots, out=self._rows[1])
        if self._wide_rows is not None:
            self._wide_rows[0].copy_(self._rows[0])
            self._wide_rows[1].copy_(self._rows[1])

    @staticmethod
    def _decode(
        cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, place: torch.Tensor
    ) -> None:
        # Not every operation knows 8 bits as floats: they are moved as bytes.
        gathered = rows.view(torch.uint8)
        torch.index_select(cache.view(torch.uint8), 0, slots, out=gathered)
        num_seqs, num_kv_heads, length, _ = place.shape
        gathered = gathered.view(num_seqs, length, num_kv_heads, -1)
        place.copy_(decode_rows(gathered, cache.dtype).transpose(1, 2))
