"""Life: whether a server takes requests, and which ones it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


class RunningRequest:
    """The task of a request, which may be ended from outside.

    Cancelled once, and not over and over as a cancel scope of anyio does it: what cleans up after
    a request waits for the engine's part of it.

    Attributes
    ----------
    ended : bool
        Whether it was.
    late : bool
        Whether that was because it took too long.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.ended = False
        self.late = False

    def end(self, *, late: bool = False) -> None:
        """Cancel the task."""
        if not self.ended:
            self.ended = True
            self.late = late
            self._task.cancel()

    def is_own(self) -> bool:
        """Take back the cancellation, and return whether nobody else has cancelled the task."""
        if not self.ended:
            return False
        uncancel = getattr(self._task, "uncancel", None)  # since Python 3.11
        return uncancel is None or uncancel() == 0


class Life:
    """What is known of a server's end.

    Attributes
    ----------
    ending : str or None
        Why no more requests are taken; None while they are.
    broken : BaseException or None
        What the engine broke by.
    """

    def __init__(self) -> None:
        self.ending: str | None = None
        self.broken: BaseException | None = None
        self._requests: set[RunningRequest] = set()

    @property
    def num_requests(self) -> int:
        """How many requests are being answered."""
        return len(self._requests)

    @contextmanager
    def request(self, seconds: float | None) -> Iterator[RunningRequest]:
        """Count the request of the running task, and end it after some seconds."""
        running = RunningRequest()
        timer = None
        if seconds is not None:
            end = partial(running.end, late=True)
            timer = asyncio.get_running_loop().call_later(seconds, end)
        self._requests.add(running)
        try:
            yield running
        finally:
            self._requests.discard(running)
            if timer is not None:
                timer.cancel()

    async def end(self, reason: str, seconds: float) -> int:
        """Take no more requests, and return when there are none.

        Parameters
        ----------
        reason : str
            What clients are told.
        seconds : float
            How long requests have to finish; those that have not are ended then.

        Returns
        -------
        int
            How many were ended.
        """
        self.ending = reason
        await self._wait(seconds)
        late = list(self._requests)
        for running in late:
            running.end()
        await self._wait(2.0)
        return len(late)

    async def _wait(self, seconds: float) -> None:
        clock = asyncio.get_running_loop()
        until = clock.time() + seconds
        while self._requests and clock.time() < until:
            await asyncio.sleep(0.02)
