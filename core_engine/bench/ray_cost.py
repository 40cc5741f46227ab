"""What Ray's calls cost the process that makes them: a request, and a token that is handed on."""

from __future__ import annotations

import os
import statistics
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_CALLS = 200
_STREAMS = 5
_TOKENS = 400


def is_there() -> bool:
    """Whether Ray is installed."""
    return find_spec("ray") is not None


def measure_ray() -> tuple[float, float]:
    """Start Ray here, and return the seconds that a request and a token keep a router busy.

    They are of processor time: a router has many requests at once, and waits for none.
    """
    ray: Any = import_module("ray")  # Any: it has no types of what it decorates
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        replica = ray.remote(_Replica).remote()
        ray.get(replica.answer.remote())
        _stream(ray, replica, 10)
        calls = []
        for _ in range(_CALLS):
            started = time.process_time()
            ray.get(replica.answer.remote())
            calls.append(time.process_time() - started)
        tokens = [_stream(ray, replica, _TOKENS) / _TOKENS for _ in range(_STREAMS)]
        return statistics.mean(calls), statistics.median(tokens)
    finally:
        ray.shutdown()


class _Replica:
    """What answers, and does no work for it."""

    def answer(self) -> int:
        return 0

    def tokens(self, count: int) -> Any:
        for each in range(count):  # noqa: UP028  Ray wants a generator of Python's own
            yield each


def _stream(ray: Any, replica: Any, count: int) -> float:
    started = time.process_time()
    for each in replica.tokens.options(num_returns="streaming").remote(count):
        ray.get(each)
    return time.process_time() - started
