"""Clock: how long a device takes, by its own events where it has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

_LEAST = 5
_MOST = 100
_FLUSHED_BYTES = 512 << 20
"""More than any cache between the memory and a device: written between two calls."""

Call = Callable[[], object]


class Clock:
    """Times of calls on one device, which may run them later than they are made.

    Parameters
    ----------
    device : torch.device
        An accelerator, whose events are asked, or a CPU, where the wall clock is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: ModuleType | None = None
        self._flushed: torch.Tensor | None = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
            self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told."""
        if self._module is not None:
            self._module.synchronize()

    def close(self) -> None:
        """Give the memory back that is written between calls."""
        self._flushed = None
        if self._module is not None:
            self._module.empty_cache()

    def times(self, call: Call, seconds: float) -> list[float]:
        """Time calls of one thing, see `in_turns`."""
        return self.in_turns({"": call}, seconds)[""]

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
        """Time calls in turns, A B A B, each with nothing of what it reads in a cache.

        Parameters
        ----------
        calls : mapping of str to callable
        seconds : float
            For all of it together: from 5 to 100 rounds, as many as fit.

        Returns
        -------
        dict of str to list of float
            Seconds of each call. On an accelerator, the kernels of a call are told to it while it
            still flushes its cache, so that times are those of the device and not of the host,
            unless the host takes longer than that.
        """
        started = time.perf_counter()
        for call in calls.values():  # compiles, and finds its memory
            call()
            call()
        self.synchronize()
        found: dict[str, list[float]] = {name: [] for name in calls}
        pending: list[tuple[str, Any, Any]] = []
        for done in range(_MOST):
            if done >= _LEAST and time.perf_counter() - started > seconds:
                break
            for name, call in calls.items():
                if self._module is None or self._flushed is None:
                    before = time.perf_counter()
                    call()
                    found[name].append(time.perf_counter() - before)
                    continue
                first, last = (self._module.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                first.record()
                call()
                last.record()
                pending.append((name, first, last))
            if done % _LEAST == _LEAST - 1:  # or the budget would be that of the host
                self.synchronize()
        self.synchronize()
        for name, first, last in pending:
            found[name].append(first.elapsed_time(last) / 1e3)
        return found
