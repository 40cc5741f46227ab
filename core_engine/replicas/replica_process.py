"""ReplicaProcess: a copy of the engine in another process, as the first one's sees it."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from quire.executor.child_process import ChildProcess
from quire.executor.messages import Message
from quire.replicas.outbox import Outbox, messages_of

News = Callable[[int, Message], None]
"""Told, from a thread, the number of a replica and what it says of a request."""


class ReplicaProcess(ChildProcess):
    """A process that runs a whole engine and its loop.

    Parameters
    ----------
    number : int
        From 1 up.
    environ : mapping of str to str
        Added to this process's environment.
    lose : callable
        Told once, from a thread, with the number and why, when it is no more, or hangs.
    tell : callable
        Told what it says of requests, in order.

    Attributes
    ----------
    last_metrics : dict
        What it counted, when it was asked last.
    """

    def __init__(
        self,
        number: int,
        environ: Mapping[str, str],
        lose: Callable[[int, str], None],
        tell: News,
    ) -> None:
        self._tell = tell
        self._numbers = itertools.count()
        self._asking = threading.Lock()
        self._is_over = False
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self.last_metrics: dict[str, float] = {}
        super().__init__("quire.replicas.program", "replica", number, (), environ, lose)
        self.outbox = Outbox(self.channel)

    def hear(self, message: Message) -> None:
        """Take what it said; on the listening thread."""
        if message["what"] != "batch":
            self.replies.put(message)
            return
        for each in messages_of(message):
            if each["what"] == "answer":
                with self._asking:
                    waiting = self._answers.pop(each["number"], None)
                if waiting is not None:
                    waiting.put(each["answer"])
            else:
                self._tell(self.number, each)

    def listen(self) -> None:
        """Hear what it says until its end, and let nobody wait for more."""
        super().listen()
        with self._asking:
            self._is_over = True
            left, self._answers = self._answers, {}
        for waiting in left.values():
            waiting.put(None)

    def ask(self, about: str) -> Callable[[float], Any]:
        """Ask for something; return what waits for the answer until a moment, or returns None.

        Parameters
        ----------
        about
            One of `quire.replicas.program.QUESTIONS`.
        """
        number = next(self._numbers)
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._asking:
            if self._is_over:
                answer.put(None)
            else:
                self._answers[number] = answer
        self.outbox.put({"what": "ask", "about": about, "number": number})

        def wait(until: float) -> Any:
            try:
                return answer.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                with self._asking:
                    self._answers.pop(number, None)
                return None

        return wait

    def end(self) -> None:
        """Ask it to end, when it has what was sent before."""
        self._is_ending = True
        self.outbox.put({"what": "end"})

    def join(self, seconds: float) -> None:
        """Wait for its end, and bring it about after a while."""
        super().join(seconds)
        self.outbox.close(1.0)
