"""HttpMetrics: requests by endpoint, method and status, and how long they took."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from quire.server.histogram import Histogram

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class HttpMetrics:
    """Counts answers; labels take few values, whatever clients send."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[tuple[str, str], Histogram] = {}

    def observe(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Count an answer.

        Parameters
        ----------
        method : str
        handler : str
            The endpoint's path with its parameters' names.
        status : int
        seconds : float
            From the request's head to the end of the answer.
        """
        if method not in _METHODS:
            method = "other"
        key = (handler, method, f"{status // 100}xx")
        self._counts[key] = self._counts.get(key, 0) + 1
        histogram = self._seconds.get(key[:2])
        if histogram is None:
            histogram = self._seconds[key[:2]] = Histogram(_BOUNDS)
        histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield what was counted."""
        requests = CounterMetricFamily(
            "http_requests", "Requests, by endpoint.", labels=["handler", "method", "status"]
        )
        for key, count in self._counts.items():
            requests.add_metric(key, count)
        yield requests
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            labels=["handler", "method"],
        )
        for labels, histogram in self._seconds.items():
            seconds.add_metric(labels, histogram.buckets(), histogram.sum)
        yield seconds
