"""Ranks: the worker processes of a model, which are started, told, watched and ended together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from quire import errors
from quire.errors import QuireError, RankError
from quire.executor.channel import ChannelClosedError
from quire.executor.messages import Message, pack
from quire.utils.log import get_logger

logger = get_logger(__name__)

_END_SECONDS = 5.0
_REASON_SECONDS = 3.0
"""The death of a process is noticed here and there, and not at once."""


class Replies(Protocol):
    """What a rank says, in the order in which it does; None when nothing more will come."""

    def get(self) -> Message | None:
        """Wait for the next."""


class RemoteRank(Protocol):
    """A rank of another process, as the engine's sees it."""

    @property
    def rank(self) -> int:
        """Which one."""

    @property
    def replies(self) -> Replies:
        """What it says, but for signs of life."""

    def send_packed(self, data: bytes) -> None:
        """Send what `quire.executor.messages.pack` made, behind all that was sent before.

        Raises
        ------
        ChannelClosedError
        """

    def end(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """Bring about its end, whatever it does."""

    def join(self, seconds: float) -> None:
        """Wait for its end, and bring it about after a while."""


class Ranks:
    """All ranks of a model but the first.

    Parameters
    ----------
    count : int
        Of all ranks.
    start : callable
        From a rank, and what is to be told when it is lost, to how it is seen here.
    abort : callable
        Ends all waiting for other ranks, in all of them; told which one is lost, and why.
    reason_seconds : float
        How long it may take until it is known why a step cannot go on.
    """

    def __init__(
        self,
        count: int,
        start: Callable[[int, Callable[[int, str], None]], RemoteRank],
        abort: Callable[[int, str], None],
        reason_seconds: float = _REASON_SECONDS,
    ) -> None:
        self._abort = abort
        self._reason_seconds = reason_seconds
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._lost: RankError | None = None
        self._is_closed = False
        self.workers: list[RemoteRank] = []
        try:
            for rank in range(1, count):
                self.workers.append(start(rank, self._lose))
        except BaseException:
            self.close()
            raise

    def _lose(self, rank: int, why: str) -> None:
        with self._lock:
            if self._lost is not None or self._is_closed:
                return
            self._lost = RankError(rank, why)
        logger.error("%s", self._lost)
        self._abort(rank, why)
        # What waits for one of them by other means than shared memory sees that they are gone.
        for worker in list(self.workers):
            worker.kill()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send all of them a message, in the same order as all others.

        Raises
        ------
        RankError
        """
        self.tell_packed(pack(message))

    def tell_packed(self, data: bytes) -> None:
        """Send what `quire.executor.messages.pack` made; see `tell`."""
        try:
            with self._telling:
                for worker in self.workers:
                    worker.send_packed(data)
        except ChannelClosedError as error:
            raise self.loss(error) from error

    def collect(self, what: str) -> list[Message]:
        """Wait for an answer of each.

        Raises
        ------
        QuireError
            One failed; of the type that it was of there.
        """
        answers = []
        for worker in self.workers:
            answer = worker.replies.get()
            if answer is None:
                raise self.loss(None)
            if answer["what"] == "failed":
                kind = getattr(errors, answer["kind"], None)
                if not (isinstance(kind, type) and issubclass(kind, QuireError)):
                    raise self.loss(None)
                raise kind(f"rank {worker.rank}: {answer['text']}")
            assert answer["what"] == what, answer["what"]
            answers.append(answer)
        return answers

    def loss(self, error: BaseException | None) -> RankError:
        """Return what there is to say when a step cannot go on."""
        end = time.monotonic() + self._reason_seconds
        while self._lost is None and time.monotonic() < end:
            time.sleep(0.02)
        with self._lock:
            if self._lost is None:
                own = "" if error is None else f": {type(error).__name__}: {error}"
                self._lost = RankError(0, f"left the others in the middle of a step{own}")
            lost = self._lost
        self._abort(lost.rank, lost.why)
        return RankError(lost.rank, lost.why)  # each is raised with a traceback of its own

    def close(self) -> None:
        """End all of them; those that do not are killed."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            is_lost = self._lost is not None
        for worker in self.workers:
            worker.end()
        end = time.monotonic() + (0.5 if is_lost else _END_SECONDS)
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
