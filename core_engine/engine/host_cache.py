"""HostCache: copies of blocks of the KV cache in the host's memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from quire.engine.host_blocks import Pairs
from quire.utils.transfers import upload

logger = logging.getLogger("quire")

_ALIGNED = 512
"""Bytes at whose multiples the memory of a cache begins."""


class HostCache:
    """Room in the host's memory for so many blocks of all layers.

    Nothing waits for the device: copies take their turn among the steps that it was told to
    compute, and only it reads what they left.

    Parameters
    ----------
    caches : sequence of Tensor[num_blocks, block_size, num_kv_heads, row_width]
        Keys and values of all layers, on one device.
    num_bytes : float
        Most bytes that it may take.

    Raises
    ------
    MemoryError, RuntimeError
        There are not as many.
    """

    def __init__(self, caches: Sequence[torch.Tensor], num_bytes: float) -> None:
        self._caches = [_as_words(cache) for cache in caches]
        self._device = caches[0].device
        rooms = [cache[0].nbytes for cache in self._caches]
        left = num_bytes - _ALIGNED * len(rooms)
        self.num_blocks = max(0, int(left // sum(rooms)))
        """How many there is room for."""
        starts = [0]
        for each in rooms:
            starts.append(starts[-1] + -(-each * self.num_blocks // _ALIGNED) * _ALIGNED)
        # All in one piece: pinned memory is handed out in powers of 2.
        pinned = self._device.type != "cpu" and self.num_blocks > 0
        memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
        self._copies = [
            memory[start : start + room * self.num_blocks]
            .view(cache.dtype)
            .view(self.num_blocks, *cache.shape[1:])
            for start, room, cache in zip(starts, rooms, self._caches, strict=False)
        ]

    def save(self, pairs: Pairs) -> None:
        """Copy blocks to the host's."""
        places, runs = self._places(pairs)
        for cache, copy in zip(self._caches, self._copies, strict=True):
            found = cache.index_select(0, places)
            for first, last, host in runs:
                copy[host : host + last - first].copy_(found[first:last], non_blocking=True)

    def restore(self, pairs: Pairs) -> None:
        """Copy blocks back from the host's."""
        places, runs = self._places(pairs)
        for cache, copy in zip(self._caches, self._copies, strict=True):
            found = torch.empty(
                (len(pairs), *cache.shape[1:]), dtype=cache.dtype, device=self._device
            )
            for first, last, host in runs:
                found[first:last].copy_(copy[host : host + last - first], non_blocking=True)
            cache.index_copy_(0, places, found)

    def _places(self, pairs: Pairs) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
        """Return the blocks, and the runs of host blocks beside each other, which go at once."""
        pairs = sorted(pairs, key=lambda pair: pair[1])
        (places,) = upload([np.array([block for block, _ in pairs])], self._device)
        runs: list[tuple[int, int, int]] = []
        first = 0
        for end in range(1, len(pairs) + 1):
            if end == len(pairs) or pairs[end][1] != pairs[end - 1][1] + 1:
                runs.append((first, end, pairs[first][1]))
                first = end
        return places, runs


def _as_words(cache: torch.Tensor) -> torch.Tensor:
    """Return the same memory as integers, of the largest kind that its rows are made of.

    Not every operation takes every type of a cache, and single bytes are slow to move.
    """
    parts = cache.view(torch.uint8)
    sizes = [parts.shape[-1], parts.storage_offset(), *parts.stride()[:-1]]
    for words in (torch.int64, torch.int32):
        if all(size % words.itemsize == 0 for size in sizes):
            return parts.view(words)
    return parts


def make_host_cache(caches: Sequence[torch.Tensor], num_bytes: float) -> HostCache | None:
    """Return a `HostCache`; None, and a line in the log, where there is no memory for it."""
    try:
        made = HostCache(caches, num_bytes)
    except (MemoryError, RuntimeError) as error:
        logger.warning(
            "swap_space: there are no %.1f GiB for it (%s); what preempted requests had computed "
            "is computed anew",
            num_bytes / 2**30,
            str(error).splitlines()[0],
        )
        return None
    logger.info(
        "swap_space: %d blocks of host memory for preempted requests, %.1f GiB",
        made.num_blocks,
        num_bytes / 2**30,
    )
    return made
