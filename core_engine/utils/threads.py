"""How many threads the engine computes with."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

from quire.utils.cgroup import cgroup_folders, read_text

_lock = threading.Lock()
_applied = False


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs' worth of time that the process's cgroups allow, or None without a limit.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are looked for.
    """
    quotas = []
    for folder in cgroup_folders("cpu", root):
        period: str | None
        if (text := read_text(folder / "cpu.max")) is not None:
            quota, _, period = text.partition(" ")
        else:
            quota = read_text(folder / "cpu.cfs_quota_us") or ""
            period = read_text(folder / "cpu.cfs_period_us")
        # "max" in version 2 and -1 in version 1 are no limit.
        if quota.isdecimal() and period and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def count_threads(root: Path = Path("/")) -> int:
    """Return the number of threads to compute with, at least 1.

    ``OMP_NUM_THREADS`` where it is set; else the CPUs that the process may run on, and no more
    than its cgroups' quota of CPU time: threads past the quota only make each other wait.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(count, 1)


def apply_thread_count() -> int:
    """Let torch compute with :func:`count_threads` threads, once per process.

    A lower number that the program has given to ``torch.set_num_threads`` before stays.

    Returns
    -------
    int
        The number of threads that torch computes with from here on.
    """
    import torch

    global _applied
    with _lock:
        if not _applied:
            count = count_threads()
            if count < torch.get_num_threads():
                torch.set_num_threads(count)
            _applied = True
    return torch.get_num_threads()


class StepThreads:
    """How many threads an engine's steps compute with, where that is a share of what there is.

    Torch keeps such a number for each thread, and one for threads to come, which whoever sets the
    former sets, too. So it is set on the thread that steps, when it does so first, and given back
    there; and threads to come are left as they were, whatever other engines do meanwhile.

    Parameters
    ----------
    count : int or None
        None: as many as ever.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._before: int | None = None

    def use(self) -> None:
        """Compute with so many from here on; to be called on the thread that steps."""
        if self._before is None and self._count is not None:
            import torch

            self._before = torch.get_num_threads()
            _set_here_alone(self._count)

    def give_back(self) -> None:
        """Compute with as many as before; on the same thread."""
        if self._before is not None:
            _set_here_alone(self._before)
            self._before = self._count = None


def _set_here_alone(count: int) -> None:
    """Have this thread compute with so many, and threads to come with as many as they would."""
    import torch

    found: list[int] = []
    with _lock:
        _on_new_thread(lambda: found.append(torch.get_num_threads()))
        torch.set_num_threads(count)
        _on_new_thread(lambda: torch.set_num_threads(found[0]))


def _on_new_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run, name="quire-threads")
    thread.start()
    thread.join()
