"""AdapterMetrics: the adapters that requests run with, and wait for."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from quire.config import EngineConfig


class AdapterMetrics:
    """How many requests of each adapter there are; those that have ended leave nothing behind.

    Parameters
    ----------
    config : EngineConfig
    """

    def __init__(self, config: EngineConfig) -> None:
        self._max_loras = config.lora.max_loras if config.lora.enable_lora else 0
        self._waiting: Counter[str] = Counter()
        self._running: Counter[str] = Counter()

    def watch(self, name: str | None) -> AdapterUse:
        """Return what is told how a request of an adapter, or of none, gets on; it waits."""
        return AdapterUse(self._waiting, self._running, name)

    def family(self, prefix: str) -> GaugeMetricFamily | None:
        """Return them as vLLM has them: names in labels, and as the value the time.

        None where the engine has no adapters. There is one sample at a time, whatever clients
        call their adapters.
        """
        if not self._max_loras:
            return None
        labels = {
            "max_lora": str(self._max_loras),
            "running_lora_adapters": ",".join(sorted(self._running)),
            "waiting_lora_adapters": ",".join(sorted(self._waiting)),
        }
        told = "Adapters of requests that run, and that wait for their first token."
        family = GaugeMetricFamily(f"{prefix}lora_requests_info", told, labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family


class AdapterUse:
    """One request, from waiting to its end.

    Parameters
    ----------
    waiting, running : Counter
        Where it is counted.
    name : str or None
        Its adapter's.
    """

    __slots__ = ("_name", "_place", "_running")

    def __init__(self, waiting: Counter[str], running: Counter[str], name: str | None) -> None:
        self._name = name
        self._running = running
        self._place: Counter[str] | None = None
        self._move(waiting)

    def begin(self) -> None:
        """Take in that it runs."""
        self._move(self._running)

    def end(self) -> None:
        """Take in that it has ended, once or again."""
        self._move(None)

    def _move(self, place: Counter[str] | None) -> None:
        name, before = self._name, self._place
        if name is None:
            return
        if before is not None:
            before[name] -= 1
            if not before[name]:
                del before[name]
        if place is not None:
            place[name] += 1
        self._place = place
