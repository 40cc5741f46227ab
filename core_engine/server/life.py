"""Life: whether a server takes requests, and which ones it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import anyio


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
        self._requests: set[anyio.CancelScope] = set()

    @property
    def num_requests(self) -> int:
        """How many requests are being answered."""
        return len(self._requests)

    @contextmanager
    def request(self, scope: anyio.CancelScope) -> Iterator[None]:
        """Count a request that ``scope`` ends."""
        self._requests.add(scope)
        try:
            yield
        finally:
            self._requests.discard(scope)

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
        for scope in late:
            scope.cancel()
        await self._wait(2.0)
        return len(late)

    async def _wait(self, seconds: float) -> None:
        clock = asyncio.get_running_loop()
        until = clock.time() + seconds
        while self._requests and clock.time() < until:
            await asyncio.sleep(0.02)
