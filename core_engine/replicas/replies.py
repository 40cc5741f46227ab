"""What several copies of an engine answer, made one answer of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from quire.engine.cache_map import KVCacheMap
from quire.replicas.wire import cache_map_from_message

_GAUGES = frozenset(
    {
        "num_adapters_in_memory", "num_adapters_in_slots", "num_running_seqs", "num_waiting_seqs",
        "num_unfinished_requests", "num_queued_requests", "kv_cache_usage", "num_kv_blocks",
        "num_replicas",
    }
)  # fmt: skip
"""Metrics of a moment, of which one that is lost has none."""


def combine_metrics(
    live: Sequence[dict[str, float]], lost: Iterable[dict[str, float]] = ()
) -> dict[str, float]:
    """Return the sums of counters, those of lost replicas too, and of the others' gauges."""
    names = live[0]
    total = {name: sum(each.get(name, 0) for each in live) for name in names}
    for each in lost:
        for name in names:
            if name not in _GAUGES:
                total[name] += each.get(name, 0)
    used = sum(each.get("kv_cache_usage", 0) * each.get("num_kv_blocks", 0) for each in live)
    total["kv_cache_usage"] = used / max(1, total["num_kv_blocks"])
    return total


def combine_adapters(
    own: dict[str, tuple[int, int]], others: Iterable[Any]
) -> dict[str, tuple[int, int]]:
    """Return how many requests have begun, and how many wait, by adapters' names."""
    total = dict(own)
    for each in others:
        for name, (begun, waiting) in (each or {}).items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + begun, before[1] + waiting
    return total


def combine_maps(own: KVCacheMap, others: Iterable[Any]) -> KVCacheMap:
    """Return one map of all caches."""
    blocks = list(own.blocks)
    for each in others:
        if each is not None:
            blocks += cache_map_from_message(each).blocks
    return KVCacheMap(own.block_size, blocks, own.dtype)
