"""Conversations of one batch that reach the engine together, each from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from quire.errors import RequestFailedError
from quire.outputs import RequestOutput
from quire.waiting import Event, failure

if TYPE_CHECKING:
    from quire.engine.request import Request
    from quire.llm import LLM

T = TypeVar("T")

MOST_THREADS = 256
"""Calls of a batch that are at work at once; further ones begin as these end."""

_PATIENCE = 0.25
"""Seconds without a newcomer after which those who wait go ahead: somebody is held up."""


class Gathering:
    """Lets requests of several threads enter the engine as one batch.

    LangChain runs a batch of chat calls in threads, so that each has its cache, its callbacks and
    its failure to itself. Here a thread with a request waits until every other that is at work
    has one in the engine or here, too.

    Parameters
    ----------
    llm : LLM
    num_calls : int
        Calls that the batch is made of, each run by :meth:`call`.
    width : int
        How many of them are at work at once, at most.
    fail_fast : bool
        Whether the failure of one call ends all of them.

    Attributes
    ----------
    failure : BaseException or None
        What the first call that failed raised.
    """

    def __init__(self, llm: LLM, num_calls: int, width: int, *, fail_fast: bool) -> None:
        self._loop = llm._lifetime.start()
        self._width = width
        self._fail_fast = fail_fast
        self._lock = threading.Lock()
        self._num_left = num_calls
        self._waiting: list[tuple[Request, SimpleQueue[Event]]] = []
        self._running: set[str] = set()
        self._last_arrival = 0.0
        self._abandoned = False
        self.failure: BaseException | None = None

    def call(self, function: Callable[[], T]) -> T:
        """Return what a call of the batch returns; nobody waits for it after it has ended."""
        try:
            return function()
        except BaseException as error:
            self.failure = self.failure or error
            if self._fail_fast:
                self.abandon()
            raise
        finally:
            with self._lock:
                self._num_left -= 1
            self._go_ahead()

    def run(self, request: Request) -> RequestOutput:
        """Run a request beside those of the other threads, and return its last output.

        Raises
        ------
        RequestFailedError
            It failed while it ran, or :meth:`abandon` was called.
        """
        self._loop.check_may_wait()
        events: SimpleQueue[Event] = SimpleQueue()
        with self._lock:
            if not self._abandoned:
                self._waiting.append((request, events))
                self._last_arrival = time.monotonic()
        self._go_ahead()
        try:
            event = self._last_event(events)
        finally:
            with self._lock:
                self._running.discard(request.request_id)
        if event is None or self._abandoned:
            raise RequestFailedError(request.request_id, "its batch was given up")
        if isinstance(event, BaseException):
            try:
                raise failure(request.request_id, event)
            finally:  # the exception has this frame, which would have the exception
                del event
        return event

    def abandon(self) -> None:
        """End all requests that run or wait: nobody wants the answers any more."""
        with self._lock:
            self._abandoned = True
            self._waiting.clear()  # these never begin
            self._loop.abort(list(self._running))

    def _last_event(self, events: SimpleQueue[Event]) -> Event | None:
        while not self._abandoned:
            try:
                event = events.get(timeout=_PATIENCE)
            except Empty:
                self._go_ahead(held_up=True)
                continue
            if isinstance(event, BaseException) or event.finished:
                return event
        return None

    def _go_ahead(self, *, held_up: bool = False) -> None:
        """Submit those who wait, if nobody is left to wait for or somebody takes too long."""
        with self._lock:
            at_work = min(self._width, self._num_left)
            complete = len(self._waiting) + len(self._running) >= at_work
            if held_up:
                complete |= time.monotonic() - self._last_arrival >= _PATIENCE
            if self._abandoned or not complete or not self._waiting:
                return
            waiting, self._waiting = self._waiting, []
            self._running.update(request.request_id for request, _ in waiting)
            try:  # with the lock: what is abandoned later has to be in the engine to be aborted
                self._loop.submit([(request, events.put) for request, events in waiting])
            except BaseException as error:  # of a closed engine: everybody is told
                for _, events in waiting:
                    events.put(error)
