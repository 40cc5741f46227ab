"""Which CPU cores a process computes on."""

from __future__ import annotations

import os


def own_cores(cores: list[int], index: int, count: int) -> list[int]:
    """Return one of several shares of some cores: side by side, as even as can be.

    All of them, where there are fewer cores than shares.
    """
    if len(cores) < count:
        return cores
    each, more = divmod(len(cores), count)
    first = index * each + min(index, more)
    return cores[first : first + each + (index < more)]


def keep_to_own_cores(index: int, count: int) -> None:
    """Keep this process to its share of the cores that it may run on, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own_cores(cores, index, count))
