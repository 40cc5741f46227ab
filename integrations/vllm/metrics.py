"""vLLM's Counter and Gauge, from quire's counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_COUNTERS = {
    "num_prompt_tokens": "vllm:prompt_tokens",
    "num_generation_tokens": "vllm:generation_tokens",
    "num_preemptions": "vllm:num_preemptions",
    "num_cached_tokens": "vllm:prefix_cache_hits",
}
_GAUGES = {
    "num_running_seqs": "vllm:num_requests_running",
    "num_waiting_seqs": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}


@dataclass
class Metric:
    """A number with a name.

    Attributes
    ----------
    name : str
    labels : dict of str to str
    """

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Counter(Metric):
    """One that only grows."""

    value: int = 0


@dataclass
class Gauge(Metric):
    """One of this moment."""

    value: float = 0.0


def as_metrics(values: Mapping[str, float]) -> list[Metric]:
    """Return the engine's numbers under vLLM's names, and the rest under quire's."""
    found: list[Metric] = []
    for name, value in values.items():
        if name in _GAUGES:
            found.append(Gauge(_GAUGES[name], value=value))
        elif name in _COUNTERS:
            found.append(Counter(_COUNTERS[name], value=int(value)))
        else:
            found.append(Gauge(f"quire:{name}", value=value))
    return found
