"""QueueBound: how many requests may wait, and when one that may not is to try again."""

from __future__ import annotations

import time
from collections import deque

from quire.errors import EngineBusyError


class QueueBound:
    """Knows how fast requests ended of late."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=64)

    def note_end(self) -> None:
        """A request has ended."""
        self._ends.append(time.monotonic())

    def check(self, queued: int, longest: int) -> None:
        """Refuse one more request where `queued` wait, and no more than `longest` may.

        Raises
        ------
        EngineBusyError
        """
        if queued < longest:
            return
        seconds = 1.0
        if len(self._ends) > 1:  # as fast as they ended of late, they will go on to end
            rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
            seconds = min(max(queued / rate, 1.0), 60.0)
        raise EngineBusyError(
            f"{queued} requests wait for the engine, and max_waiting_requests={longest} may: "
            f"try again in {seconds:.0f} s",
            retry_after=seconds,
        )
