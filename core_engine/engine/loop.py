"""EngineLoop: the one thread that steps an engine, and the door for all others."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from quire.engine.engine import request_failed
from quire.engine.interface import AnyEngine, Later, StepOutput
from quire.engine.request import Request
from quire.errors import DeviceLostError, EngineClosedError, RequestFailedError
from quire.outputs import RequestOutput

logger = logging.getLogger("quire")

_IDLE_SECONDS = 60.0
"""How long a call to wake up that was lost can remain unnoticed."""

T = TypeVar("T")
Action = Callable[[AnyEngine], None]
Sink = Callable[[RequestOutput | BaseException], None]
"""Is told what becomes of a request, on the loop's thread: it must not block."""


class EngineLoop:
    """Steps an engine on a thread of its own for as long as there is work.

    Requests from all threads and event loops join one running batch. The thread starts with the
    first request, so that a process may fork before it, and ends with :meth:`close`.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self._engine: AnyEngine | None = engine
        self._wakeup = threading.Condition()
        self._inbox: list[Action] = []
        self._sinks: dict[str, Sink] = {}  # touched by the loop's thread alone
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._closing = False
        self._breakdown: BaseException | None = None

    @property
    def engine(self) -> AnyEngine:
        """The engine; only what never changes may be read from another thread.

        Raises
        ------
        EngineClosedError
            After :meth:`close`.
        """
        engine = self._engine
        if engine is None:
            raise self._closed_error()
        return engine

    # -- called from any thread ----------------------------------------------------------------

    def submit(
        self, items: Iterable[tuple[Request, Sink]], *, longest_queue: int | None = None
    ) -> None:
        """Add requests, all before the next step.

        A sink is called with each output, the last of which has ``finished`` set, or with the
        exception that ended its request: EngineBusyError, where as many as ``longest_queue``
        others have to wait.
        """
        items = list(items)

        def add(engine: AnyEngine) -> None:
            for request, sink in items:
                try:
                    if longest_queue is not None:
                        engine.check_queue(longest_queue)
                    engine.add_request(request)
                except BaseException as error:
                    self._tell(sink, request.request_id, error)
                else:
                    self._sinks[request.request_id] = sink

        self._post(add)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; their sinks get a last output with ``finish_reason="abort"``."""
        request_ids = list(request_ids)
        with contextlib.suppress(EngineClosedError):  # closing has ended them
            self._post(lambda engine: self._deliver(engine.abort(request_ids)))

    def abort_all(self, engine: AnyEngine) -> None:
        """End every request in flight; for :meth:`call`, that no other comes in between."""
        self._deliver(engine.abort(list(self._sinks)))

    def call(self, function: Callable[[AnyEngine], T | Later[T]]) -> T:
        """Run ``function(engine)`` between two steps and return what it returns."""
        if threading.current_thread() is self._thread:
            return _finished(function(self.engine))
        future: Future[T | Later[T]] = Future()

        def run(engine: AnyEngine) -> None:
            try:
                future.set_result(function(engine))
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return _finished(future.result())

    def post(self, action: Action) -> None:
        """Run ``action(engine)``, which must not raise, between two steps; do not wait for it."""
        self._post(action)

    def wake(self) -> None:
        """Look whether the engine has work; any thread may say so."""
        if self._pid == os.getpid():  # in a fork the lock may be held for ever
            with self._wakeup:
                self._wakeup.notify_all()

    def release_adapters(self) -> None:
        """Let the engine give up adapters that nobody needs any more, also where it is idle."""
        if self._pid != os.getpid():  # in a fork the lock may be held for ever
            return
        with self._wakeup:
            # Without a thread there was no step yet, and the engine has none.
            if self._thread is not None and not self._closing:
                self._inbox.append(lambda engine: engine.release_adapters())
                self._wakeup.notify_all()

    @property
    def broken(self) -> BaseException | None:
        """What the engine broke down with, if it did."""
        return self._breakdown

    def check_may_wait(self) -> None:
        """Raise RuntimeError on the loop's own thread: it would wait for itself for ever."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "an answer was waited for on the engine's own thread, as by a logits processor: "
                "nothing can run before that returns; use another engine there"
            )

    def close(self) -> None:
        """End the requests in flight, free the engine, end the thread. Idempotent."""
        with self._wakeup:
            self._closing = True
            thread = self._thread if self._pid == os.getpid() else None
            self._wakeup.notify_all()
        if thread is None:
            self._shut_down()
        elif thread is not threading.current_thread():
            thread.join()

    def _post(self, action: Action) -> None:
        if self._pid != os.getpid() and self._thread is not None:
            raise EngineClosedError(
                "this engine runs in the process that made it and does not survive a fork once "
                "it has served a request: make a new one in this process"
            )
        with self._wakeup:
            if self._closing:
                raise self._closed_error()
            if self._thread is None:
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
                self._thread.start()
            self._inbox.append(action)
            self._wakeup.notify_all()

    def _closed_error(self) -> EngineClosedError:
        error = self._breakdown
        why = "is closed" if error is None else f"broke down ({type(error).__name__}: {error})"
        return EngineClosedError(f"the engine {why}: make a new one")

    # -- the loop's thread: whatever is raised here, the thread must not die and leave others wait

    def _run(self) -> None:
        engine = self.engine
        try:
            while self._wait(engine):
                self._turn(engine)
        except BaseException as error:
            logger.exception("the engine broke down and is closed")
            self._breakdown = error.with_traceback(None)  # its frames hold the engine
            with self._wakeup:
                self._closing = True
        del engine
        self._shut_down()

    def _wait(self, engine: AnyEngine) -> bool:
        """Wait for something to do; return False when that is to end."""
        with self._wakeup:
            while not (self._inbox or self._closing or engine.has_work):
                # The garbage collector may run on this very thread, in between, and close.
                self._wakeup.wait(_IDLE_SECONDS)
            return not self._closing

    def _turn(self, engine: AnyEngine) -> None:
        with self._wakeup:
            inbox, self._inbox = self._inbox, []
        for action in inbox:
            action(engine)
        try:
            outputs = engine.step()
        except DeviceLostError:  # nothing can run any more
            raise
        except BaseException as error:
            logger.exception("a step broke down; the requests in flight end with it")
            self._deliver(engine.restart(error))
            # Nothing is in flight any more: whoever was not told is told now.
            self._deliver([request_failed(id_, error) for id_ in self._sinks])
        else:
            self._deliver(outputs)

    def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        with self._wakeup:
            inbox, self._inbox = self._inbox, []
        if engine is not None:
            try:
                engine.close()
            except BaseException:
                logger.exception("the engine was closed, but its books are in disorder")
            for action in inbox:  # requests are refused and told so; calls run a last time
                action(engine)
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            self._tell(sink, request_id, self._closed_error())

    def _deliver(self, outputs: Iterable[StepOutput]) -> None:
        for output in outputs:
            last = isinstance(output, RequestFailedError) or output.finished
            request_id = output.request_id
            sink = self._sinks.pop(request_id, None) if last else self._sinks.get(request_id)
            if sink is not None:
                self._tell(sink, request_id, output)

    def _tell(self, sink: Sink, request_id: str, news: RequestOutput | BaseException) -> None:
        try:
            sink(news)
        except BaseException:  # a sink is somebody else's code: it may lose its own news only
            logger.exception("the receiver of request %r failed; aborting it", request_id)
            engine = self._engine
            self._sinks.pop(request_id, None)
            if engine is not None:
                engine.abort([request_id])


def loop_for(engine: AnyEngine) -> EngineLoop:
    """Return a loop, not started, which an engine tells of adapters that it can give up."""
    loop = EngineLoop(engine)
    known = weakref.ref(loop)  # adapters may outlive it

    def release_adapters() -> None:
        if (loop := known()) is not None:
            loop.release_adapters()

    engine.lost_adapters.notify = release_adapters
    return loop


def _finished(answer: T | Later[T]) -> T:
    return answer.finish() if isinstance(answer, Later) else answer
