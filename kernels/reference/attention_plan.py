"""AttentionPlan: what all layers of one step share, worked out once.

Sequences are computed in groups of like shape, each group as one padded batch. Where a group
is padded, it reads slot 0 of the null block, which is always zero: what another sequence left
in a block is never even multiplied by a weight of 0, so a NaN in it cannot spread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quire.kernels.kv_rows import SCALE_BYTES, is_coded
from quire.kernels.reference.sequence_group import Integers, SequenceGroup
from quire.kernels.reference.workspace import Workspace

_LEAST_QUERY_BUCKET = 4
_LEAST_KV_BUCKET = 64
"""Below these, padding costs less than another group would."""

_MERGED_PAIRS = 1024
"""Padded (query token, key) pairs that cost about as much as one more group."""

_KEYS_PER_GROUP = 1 << 12
"""Keys gathered at once, padding included, so that they are still in the cache when they are
read; a longer sequence is a group by itself."""


@dataclass(slots=True, eq=False)
class Layout:
    """The groups of one step, as the layers of one sliding window need them.

    Attributes
    ----------
    groups : list of SequenceGroup
    order : Tensor[num_tokens], int64, or None
        Where each token's result stands once those of all groups are laid end to end; None
        where they stand in order.
    """

    groups: list[SequenceGroup]
    order: torch.Tensor | None
    _workspaces: dict[tuple[object, ...], list[Workspace]] = field(default_factory=dict)

    def workspaces(
        self, key_cache: torch.Tensor, query_dtype: torch.dtype, has_softcap: bool
    ) -> list[Workspace]:
        """Return where the groups gather keys and values from caches like `key_cache`."""
        kind = (key_cache.shape[2:], key_cache.dtype, query_dtype, has_softcap)
        workspaces = self._workspaces.get(kind)
        if workspaces is None:
            workspaces = self._allocate(key_cache, query_dtype, has_softcap)
            self._workspaces[kind] = workspaces
        return workspaces

    def _allocate(
        self, key_cache: torch.Tensor, query_dtype: torch.dtype, has_softcap: bool
    ) -> list[Workspace]:
        num_kv_heads, width = key_cache.shape[2:]
        head_dim = width - SCALE_BYTES if is_coded(key_cache.dtype) else width
        buffers: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        dtypes = [
            _compute_dtype(query_dtype, key_cache.device, group.max_query_len, has_softcap)
            for group in self.groups
        ]
        for dtype in {key_cache.dtype, *dtypes}:
            # The groups are computed one after the other, so they share the memory.
            num_slots = max(group.slots.shape[0] for group in self.groups)
            size = (num_slots, num_kv_heads * (width if dtype is key_cache.dtype else head_dim))
            buffers[dtype] = (
                torch.empty(size, dtype=dtype, device=key_cache.device),
                torch.empty(size, dtype=dtype, device=key_cache.device),
            )
        return [
            Workspace.of(
                buffers[key_cache.dtype],
                None if dtype is key_cache.dtype else buffers[dtype],
                (group.num_seqs, group.max_kv_len, num_kv_heads, head_dim),
            )
            for group, dtype in zip(self.groups, dtypes, strict=True)
        ]


def _compute_dtype(
    dtype: torch.dtype, device: torch.device, query_len: int, has_softcap: bool
) -> torch.dtype:
    # On a CPU, torch multiplies 16-bit matrices more slowly than it widens them; only for the
    # few rows of a decode step is its fused kernel as good in bfloat16.
    if device.type != "cpu" or dtype is torch.float32:
        return dtype
    if dtype is torch.bfloat16 and query_len == 1 and not has_softcap:
        return torch.bfloat16
    return torch.float32


class AttentionPlan:
    """What the layers of one step share. Used by one thread at a time.

    Parameters
    ----------
    query_starts : ndarray[num_seqs]
        Each sequence's first token in the step.
    query_lens, seq_lens : ndarray[num_seqs]
    block_tables : ndarray[num_seqs, max_blocks]
        Must stay as it is until the step ends.
    block_size : int
    device : torch.device
        Where attention is computed.
    """

    __slots__ = (
        "_block_size",
        "_block_tables",
        "_contexts",
        "_device",
        "_layouts",
        "_longest",
        "_query_lens",
        "_query_starts",
    )

    def __init__(
        self,
        query_starts: Integers,
        query_lens: Integers,
        seq_lens: Integers,
        block_tables: npt.NDArray[np.int32],
        block_size: int,
        device: torch.device,
    ) -> None:
        self._query_starts = query_starts
        self._query_lens = query_lens
        self._contexts = seq_lens - query_lens
        self._block_tables = block_tables
        self._block_size = block_size
        self._device = device
        self._longest = int(seq_lens.max(initial=0))
        self._layouts: dict[int | None, Layout] = {}

    def layout(self, sliding_window: int | None) -> Layout:
        """Return the groups for layers whose tokens see `sliding_window` keys, or all (None)."""
        if sliding_window is not None and sliding_window >= self._longest:
            sliding_window = None
        layout = self._layouts.get(sliding_window)
        if layout is None:
            layout = self._layouts[sliding_window] = self._lay_out(sliding_window)
        return layout

    def _lay_out(self, window: int | None) -> Layout:
        contexts, first_blocks = self._contexts, None
        if window is not None:
            first_blocks = np.maximum(contexts + 1 - window, 0) // self._block_size
            contexts = contexts - first_blocks * self._block_size
        kv_lens = contexts + self._query_lens
        groups, tokens = [], []
        for rows, extent in _group_rows(self._query_lens, kv_lens):
            tokens.append(self._tokens(rows, extent))
            slots = self._slots(rows, first_blocks, kv_lens, extent)
            groups.append(self._group(rows, extent, tokens[-1], slots, contexts, window))
        together = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        places = np.arange(len(together))
        if np.array_equal(together, places):
            return Layout(groups, None)
        order = np.empty(int(self._query_lens.sum()), dtype=np.int64)
        # Backwards, so that a token's own place overwrites those where it stands in.
        order[together[::-1]] = places[::-1]
        return Layout(groups, self._on_device(order))

    def _tokens(self, rows: Integers, extent: _Extent) -> Integers:
        """Return the tokens of `rows`, each padded to the longest by repeating its last one."""
        starts = self._query_starts[rows]
        if extent.max_query_len == 1:
            return starts
        steps = np.arange(extent.max_query_len)
        steps = np.minimum(steps, self._query_lens[rows][:, None] - 1)
        return (starts[:, None] + steps).reshape(-1)

    def _slots(
        self,
        rows: Integers,
        first_blocks: Integers | None,
        kv_lens: Integers,
        extent: _Extent,
    ) -> Integers:
        """Return the slots of `rows`, from the first block that a token sees, padded by 0."""
        num_blocks = -(-extent.max_kv_len // self._block_size)
        if first_blocks is None:
            blocks = self._block_tables[rows, :num_blocks]
        else:
            columns = first_blocks[rows][:, None] + np.arange(num_blocks)
            columns = np.minimum(columns, self._block_tables.shape[1] - 1)
            blocks = np.take_along_axis(self._block_tables[rows], columns, axis=1)
        slots = blocks[:, :, None] * np.int64(self._block_size) + np.arange(self._block_size)
        slots = slots.reshape(len(rows), -1)[:, : extent.max_kv_len]
        if extent.min_kv_len < extent.max_kv_len:
            slots = slots * (np.arange(extent.max_kv_len) < kv_lens[rows][:, None])
        return slots.reshape(-1)

    def _group(
        self,
        rows: Integers,
        extent: _Extent,
        tokens: Integers,
        slots: Integers,
        contexts: Integers,
        window: int | None,
    ) -> SequenceGroup:
        if window is not None and extent.max_kv_len <= window:
            window = None
        first, last = int(tokens[0]), int(tokens[-1])
        follow = last - first + 1 == len(tokens) and extent.min_query_len == extent.max_query_len
        return SequenceGroup(
            num_seqs=len(rows),
            max_query_len=extent.max_query_len,
            max_kv_len=extent.max_kv_len,
            tokens=slice(first, last + 1) if follow else self._on_device(tokens),
            slots=self._on_device(slots),
            query_lens=self._query_lens[rows],
            contexts=contexts[rows],
            window=window,
            is_causal=window is None and extent.max_context == 0,
            sees_all=window is None
            and extent.max_query_len == 1
            and extent.min_kv_len == extent.max_kv_len,
        )

    def _on_device(self, numbers: Integers) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device)


def plan_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> AttentionPlan:
    """See `quire.kernels.interface.Backend.plan_attention`."""
    starts = query_start_loc.numpy().astype(np.int64)
    return AttentionPlan(
        starts[:-1],
        np.diff(starts),
        seq_lens.numpy().astype(np.int64),
        block_tables.cpu().numpy(),
        block_size,
        block_tables.device,
    )


class _Extent(NamedTuple):
    """The shortest and longest of a group."""

    min_query_len: int
    max_query_len: int
    min_kv_len: int
    max_kv_len: int
    max_context: int


def _group_rows(query_lens: Integers, kv_lens: Integers) -> list[tuple[Integers, _Extent]]:
    """Sort sequences into groups of like query and KV length; return their rows, ascending.

    Groups are ordered by their first row. Lengths in a group differ by a quarter at most, but
    for the shortest and where merging costs less than another group.
    """
    buckets = _bucket(query_lens, _LEAST_QUERY_BUCKET)
    order = np.lexsort((kv_lens, buckets))
    lens = kv_lens[order]
    keys = buckets[order] * (1 << 32) + _bucket(lens, _LEAST_KV_BUCKET)
    ends = [*(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(order)]
    bounds = [0]
    start = 0
    for index, end in enumerate(ends):
        query_len = int(keys[start]) >> 32
        if index + 1 < len(ends) and int(keys[end]) >> 32 == query_len:
            next_len = int(lens[ends[index + 1] - 1])
            padding = (next_len * (end - start) - int(lens[start:end].sum())) * query_len
            if padding <= _MERGED_PAIRS:
                continue
        step = max(1, _KEYS_PER_GROUP // int(lens[end - 1]))
        bounds += [*range(start + step, end, step), end]
        start = end
    query_lens = query_lens[order]
    extents = zip(
        np.minimum.reduceat(query_lens, bounds[:-1]).tolist(),
        np.maximum.reduceat(query_lens, bounds[:-1]).tolist(),
        np.minimum.reduceat(lens, bounds[:-1]).tolist(),
        np.maximum.reduceat(lens, bounds[:-1]).tolist(),
        np.maximum.reduceat(lens - query_lens, bounds[:-1]).tolist(),
        strict=True,
    )
    groups = [
        (np.sort(order[start:end]), _Extent(*extent))
        for start, end, extent in zip(bounds[:-1], bounds[1:], extents, strict=True)
    ]
    groups.sort(key=lambda group: int(group[0][0]))
    return groups


def _bucket(lens: Integers, least: int) -> Integers:
    """Round lengths up to a power of two or a quarter between two; 1 stays, others `least` up."""
    octaves = np.frexp(lens)[1].astype(np.int64)
    steps = np.left_shift(1, np.maximum(octaves - 3, 0))
    rounded = -(-lens // steps) * steps
    return np.where(lens == 1, 1, np.maximum(rounded, least))
