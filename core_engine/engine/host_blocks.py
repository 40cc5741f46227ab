"""HostBlocks: which blocks of host memory keep what preempted sequences had computed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.host_cache import HostCache
    from quire.engine.sequence import Sequence

Pairs = list[tuple[int, int]]
"""Blocks of the KV cache, each with one of the host's."""


class HostBlocks:
    """Blocks of the host's memory, to which those of the KV cache are copied.

    Parameters
    ----------
    make : callable
        Makes the memory, at the first use; None where there is none to be had.
    block_size : int
        Tokens per block.
    """

    def __init__(self, make: Callable[[], HostCache | None], block_size: int) -> None:
        self._make: Callable[[], HostCache | None] | None = make
        self._cache: HostCache | None = None
        self._size = block_size
        self._count = 0
        self._free: list[int] = []  # a heap: low ones first, which so lie beside each other

    @property
    def num_used(self) -> int:
        """Blocks that keep something."""
        return self._count - len(self._free)

    def copy_out(self, pairs: Pairs) -> None:
        """Copy blocks of the KV cache to the host's, as `save` said."""
        assert self._cache is not None
        self._cache.save(pairs)

    def copy_in(self, pairs: Pairs) -> None:
        """Copy blocks back from the host's, as `restore` said."""
        assert self._cache is not None
        self._cache.restore(pairs)

    def close(self) -> None:
        """Let the memory go; nothing is kept from here on."""
        self._make = self._cache = None
        self._count, self._free = 0, []

    def save(self, sequence: Sequence) -> Pairs:
        """Keep what a sequence has computed; return what to copy: nothing if there is no room."""
        if self._make is not None:
            self._cache, self._make = self._make(), None
            self._count = 0 if self._cache is None else self._cache.num_blocks
            self._free = list(range(self._count))
        count = -(-sequence.num_computed_tokens // self._size)
        if count > len(self._free):
            return []
        sequence.num_saved_tokens = sequence.num_computed_tokens
        sequence.host_block_ids = [heapq.heappop(self._free) for _ in range(count)]
        return list(zip(sequence.block_ids[:count], sequence.host_block_ids, strict=True))

    def restore(self, sequence: Sequence, first: int) -> Pairs:
        """Give a sequence back what it had, its first blocks left out; return what to copy.

        The host's blocks are free then: copies into them come after those from them.
        """
        last = -(-sequence.num_computed_tokens // self._size)
        pairs = zip(sequence.block_ids[first:last], sequence.host_block_ids[first:], strict=False)
        found = list(pairs)
        self.forget(sequence)
        return found

    def forget(self, sequence: Sequence) -> None:
        """Let go of what a sequence has here."""
        for block_id in sequence.host_block_ids:
            heapq.heappush(self._free, block_id)
        sequence.host_block_ids = []
        sequence.num_saved_tokens = 0

    def check_integrity(self, alive: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is free or held by one sequence alive."""
        held = [block_id for sequence in alive for block_id in sequence.host_block_ids]
        blocks = sorted([*self._free, *held])
        assert blocks == list(range(self._count)), f"host blocks lost or doubled: {blocks}"
        for sequence in alive:
            room = len(sequence.host_block_ids) * self._size
            assert 0 <= room - sequence.num_saved_tokens < self._size, f"{sequence} saved less"
