"""Histogram: counts of values by bounds, for a thread of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts values, without a lock: that of prometheus-client costs what a token may.

    Parameters
    ----------
    bounds : sequence of float
        Ascending; a value belongs to the first that is not below it.

    Examples
    --------
    >>> sizes = Histogram([1, 10])
    >>> sizes.observe(3)
    >>> sizes.buckets()
    [('1', 0), ('10', 1), ('+Inf', 1)]
    """

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return how many values are at most each bound, and how many there are."""
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


def steps_of_1_2_5(most: float) -> list[float]:
    """Return 1, 2, 5, 10, 20 and so on up to ``most``.

    Examples
    --------
    >>> steps_of_1_2_5(60)
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    """
    steps: list[float] = []
    unit = 1.0
    while True:
        for step in (unit, 2 * unit, 5 * unit):
            if step > most:
                return steps
            steps.append(step)
        unit *= 10
