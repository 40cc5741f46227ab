"""How a thread waits for what the engine's thread makes of its requests."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quire.engine.request import Request
from quire.errors import QuireError, RequestFailedError
from quire.outputs import RequestOutput
from quire.utils.progress import ProgressBar

if TYPE_CHECKING:
    from typing_extensions import Self

    from quire.engine.loop import EngineLoop

Event = RequestOutput | BaseException
"""What the engine's thread hands to a request's sink."""

_POLL_SECONDS = 0.5
"""How long a wait blocks at most: in between, a signal such as Ctrl-C is seen on any system."""


def failure(request_id: str, error: BaseException, where: str = "") -> BaseException:
    """Return what the caller sees of a request that ended with ``error``.

    The frames of its traceback lose their local variables: whoever keeps the exception would keep
    the model's weights by them.

    Parameters
    ----------
    request_id : str
    error : BaseException
        As the engine's thread reported it.
    where : str
        Which prompt it was, where there were several.
    """
    cause = error.__cause__ or error
    traceback.clear_frames(cause.__traceback__)
    if isinstance(error, RequestFailedError):
        if not where and error.request_id == request_id:
            return error
    elif isinstance(error, QuireError):
        return error
    failed = RequestFailedError(request_id, f"{where}{type(cause).__name__}: {cause}")
    failed.__cause__ = cause
    return failed


def wait_for_all(
    start: Callable[[], EngineLoop],
    entries: Sequence[Request | BaseException],
    use_tqdm: bool | Callable[..., Any],
) -> list[RequestOutput | BaseException]:
    """Submit the requests among the entries, and return when each has ended.

    When the wait is interrupted, as by Ctrl-C, the requests that still run are aborted.

    Parameters
    ----------
    start : callable
        Returns the loop, which is asked for only if there is a request.
    entries : list of Request or BaseException
    use_tqdm : bool or callable
        As for :class:`quire.utils.progress.ProgressBar`.

    Returns
    -------
    list of RequestOutput or BaseException
        Per entry the last output, the exception that its request ended with, or the exception
        that was there in place of a request.
    """
    ended: dict[int, RequestOutput | BaseException] = {}
    pending: dict[int, str] = {}
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    items: list[tuple[Request, Callable[[Event], None]]] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, Request):
            pending[i] = entry.request_id
            items.append((entry, _sink(events, i)))
        else:
            ended[i] = entry
    if items:
        loop = start()
        loop.check_may_wait()
        progress = ProgressBar(len(items), use_tqdm)
        try:
            loop.submit(items)
            while pending:
                try:
                    i, event = events.get(timeout=_POLL_SECONDS)
                except Empty:
                    continue
                if isinstance(event, BaseException):
                    where = f"prompt {i} of {len(entries)}: " if len(entries) > 1 else ""
                    event = failure(pending[i], event, where)
                elif not event.finished:
                    continue
                del pending[i]
                ended[i] = event
                progress.advance(event)
        except BaseException:  # nobody will read what is still to come
            loop.abort(list(pending.values()))
            raise
        finally:
            progress.close()
    return [ended[i] for i in range(len(entries))]


def _sink(events: SimpleQueue[tuple[int, Event]], i: int) -> Callable[[Event], None]:
    return lambda event: events.put((i, event))


class OutputStream(Iterator[RequestOutput]):
    """The outputs of one request as they come; made by :meth:`quire.LLM.stream`.

    Closing it, also by ``with``, or dropping it before its end aborts the request. One thread at
    a time may read it.

    Parameters
    ----------
    loop : EngineLoop
    request : Request
        Submitted at once.
    keep_alive : object
        Held for as long as the stream is: the owner of the engine.
    """

    def __init__(self, loop: EngineLoop, request: Request, *, keep_alive: object) -> None:
        self.request_id = request.request_id
        self._keep_alive: object = keep_alive
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._check_may_wait = loop.check_may_wait
        self._abort = weakref.finalize(self, loop.abort, [request.request_id])
        self._abort.atexit = False  # the engine is closed at exit anyhow
        loop.submit([(request, self._events.put)])

    def __next__(self) -> RequestOutput:
        """Return the next output; wait for it.

        Raises
        ------
        RequestFailedError
            The request failed while it ran.
        EngineClosedError
            The engine was closed meanwhile.
        """
        self._check_may_wait()
        while self._abort.alive:
            try:
                event = self._events.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if isinstance(event, BaseException):
                self._abort.detach()
                try:
                    raise failure(self.request_id, event)
                finally:
                    del event  # the exception has this frame, which would have the exception
            if event.finished:
                self._abort.detach()
                self._keep_alive = None  # a variable may keep the stream for long
            return event
        raise StopIteration

    def close(self) -> None:
        """Abort the request if it still runs; the iterator ends. Idempotent."""
        self._abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
