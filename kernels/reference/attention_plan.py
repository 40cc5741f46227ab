"""AttentionPlan: what all layers of one step share, worked out once.

Sequences are computed in groups of like shape, each group as one padded batch. Where a group
is padded, it reads slot 0 of the null block, which is always zero: what another sequence left
in a block is never even multiplied by a weight of 0, so a NaN in it cannot spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quire.kernels.reference.sequence_group import Integers, SequenceGroup

_LEAST_QUERY_BUCKET = 4
_LEAST_KV_BUCKET = 64
"""Below these, padding costs less than another group would."""

_MERGED_PAIRS = 1024
"""Padded (query token, key) pairs that cost about as much as one more group."""

_KEYS_PER_GROUP = 1 << 14
"""Keys gathered at once, padding included; a longer sequence is a group by itself."""


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


class AttentionPlan:
    """What the layers of one step share.

    Parameters
    ----------
    query_starts : ndarray[num_seqs]
        Each sequence's first token in the step.
    query_lens, seq_lens : ndarray[num_seqs]
    block_tables : Tensor[num_seqs, max_blocks]
        Must stay as it is until the step ends.
    block_size : int
    """

    __slots__ = (
        "_block_size",
        "_block_tables",
        "_contexts",
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
        block_tables: torch.Tensor,
        block_size: int,
    ) -> None:
        self._query_starts = query_starts
        self._query_lens = query_lens
        self._contexts = seq_lens - query_lens
        self._block_tables = block_tables
        self._block_size = block_size
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
        first_blocks = np.zeros_like(self._contexts)
        if window is not None:
            first_blocks = np.maximum(self._contexts + 1 - window, 0) // self._block_size
        contexts = self._contexts - first_blocks * self._block_size
        groups, tokens = [], []
        for rows in _group_rows(self._query_lens, contexts + self._query_lens):
            tokens.append(self._tokens(rows))
            groups.append(
                self._group(rows, tokens[-1], contexts[rows], first_blocks[rows], window)
            )
        together = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        places = np.arange(len(together))
        if np.array_equal(together, places):
            return Layout(groups, None)
        order = np.empty(int(self._query_lens.sum()), dtype=np.int64)
        # Backwards, so that a token's own place overwrites those where it stands in.
        order[together[::-1]] = places[::-1]
        return Layout(groups, torch.from_numpy(order).to(self._block_tables.device))

    def _tokens(self, rows: Integers) -> Integers:
        """Return the tokens of `rows`, each padded to the longest by repeating its last one."""
        query_lens = self._query_lens[rows]
        steps = np.arange(query_lens.max())
        steps = np.minimum(steps, query_lens[:, None] - 1)
        return (self._query_starts[rows][:, None] + steps).reshape(-1)

    def _group(
        self,
        rows: Integers,
        tokens: Integers,
        contexts: Integers,
        first_blocks: Integers,
        window: int | None,
    ) -> SequenceGroup:
        query_lens = self._query_lens[rows]
        kv_lens = contexts + query_lens
        max_query_len, max_kv_len = int(query_lens.max()), int(kv_lens.max())
        follows = bool(query_lens.min() == max_query_len)
        follows = follows and int(tokens[-1] - tokens[0]) + 1 == len(tokens)
        if window is not None and max_kv_len <= window:
            window = None
        return SequenceGroup(
            num_seqs=len(rows),
            max_query_len=max_query_len,
            max_kv_len=max_kv_len,
            tokens=slice(int(tokens[0]), int(tokens[-1]) + 1)
            if follows
            else torch.from_numpy(tokens).to(self._block_tables.device),
            slots=self._slots(rows, kv_lens, first_blocks, max_kv_len),
            query_lens=query_lens,
            contexts=contexts,
            window=window,
            is_causal=window is None and not contexts.any(),
            sees_all=window is None and max_query_len == 1 and int(kv_lens.min()) == max_kv_len,
        )

    def _slots(
        self, rows: Integers, kv_lens: Integers, first_blocks: Integers, max_kv_len: int
    ) -> torch.Tensor:
        tables, size = self._block_tables, self._block_size
        device = tables.device
        num_blocks = -(-max_kv_len // size)
        if len(rows) < len(tables):
            tables = tables[torch.from_numpy(rows).to(device)]
        if first_blocks.any():
            wanted = first_blocks[:, None] + np.arange(num_blocks)
            np.minimum(wanted, tables.shape[1] - 1, out=wanted)
            tables = tables.gather(1, torch.from_numpy(wanted).to(device))
        else:
            tables = tables[:, :num_blocks]
        offsets = torch.arange(size, device=device)
        slots = (tables.long() * size).unsqueeze(-1) + offsets
        slots = slots.view(len(rows), -1)[:, :max_kv_len]
        if int(kv_lens.min()) < max_kv_len:
            positions = torch.arange(max_kv_len, device=device)
            lens = torch.from_numpy(kv_lens).to(device)
            slots = slots.masked_fill(positions >= lens[:, None], 0)
        return slots.reshape(-1)


def plan_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> AttentionPlan:
    """See `quire.kernels.interface.Backend.plan_attention`."""
    starts = query_start_loc.numpy().astype(np.int64)
    plan = AttentionPlan(
        starts[:-1],
        np.diff(starts),
        seq_lens.numpy().astype(np.int64),
        block_tables,
        block_size,
    )
    return plan


def _group_rows(query_lens: Integers, kv_lens: Integers) -> list[Integers]:
    """Sort sequences into groups of like query and KV length; return their rows, ascending.

    Groups are ordered by their first row. Lengths in a group differ by a quarter at most, but
    for the shortest and where merging costs less than another group.
    """
    buckets = _bucket(query_lens, _LEAST_QUERY_BUCKET)
    order = np.lexsort((kv_lens, buckets))
    lens = kv_lens[order]
    keys = buckets[order] * (1 << 32) + _bucket(lens, _LEAST_KV_BUCKET)
    ends = [*(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(order)]
    groups = []
    start = 0
    for index, end in enumerate(ends):
        if index + 1 < len(ends) and keys[end] >> 32 == keys[start] >> 32:
            next_len = int(lens[ends[index + 1] - 1])
            padding = (next_len - lens[start:end]).sum() * int(keys[start] >> 32)
            if padding <= _MERGED_PAIRS:
                continue
        step = max(1, _KEYS_PER_GROUP // int(lens[end - 1]))
        groups += [np.sort(order[at : min(at + step, end)]) for at in range(start, end, step)]
        start = end
    groups.sort(key=lambda rows: int(rows[0]))
    return groups


def _bucket(lens: Integers, least: int) -> Integers:
    """Round lengths up to a power of two or a quarter between two; 1 stays, others `least` up."""
    octaves = np.frexp(lens)[1].astype(np.int64)
    steps = np.left_shift(1, np.maximum(octaves - 3, 0))
    rounded = -(-lens // steps) * steps
    return np.where(lens == 1, 1, np.maximum(rounded, least))
