"""Ranks: the worker processes of a model, which are started, told, watched and ended together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from quire import errors
from quire.errors import QuireError, RankError
from quire.executor.channel import ChannelClosedError
from quire.executor.messages import Message, pack
from quire.executor.worker_process import WorkerProcess
from quire.utils.log import get_logger

logger = get_logger(__name__)

_END_SECONDS = 5.0
_REASON_SECONDS = 3.0
"""How long a reason may take to be known: the death of a process is noticed here and there."""


class Ranks:
    """All ranks of a model but the first.

    Parameters
    ----------
    count : int
        Of all ranks.
    start : callable
        From a rank, and what is to be told when it is lost, to its WorkerProcess.
    abort : callable
        Ends all waiting for other ranks, in all of them; told which one is lost, and why.
    """

    def __init__(
        self,
        count: int,
        start: Callable[[int, Callable[[int, str], None]], WorkerProcess],
        abort: Callable[[int, str], None],
    ) -> None:
        self._abort = abort
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._lost: RankError | None = None
        self._is_closed = False
        self.workers: list[WorkerProcess] = []
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
            worker.process.kill()

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
                    worker.channel.send_packed(data)
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
        end = time.monotonic() + _REASON_SECONDS
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
