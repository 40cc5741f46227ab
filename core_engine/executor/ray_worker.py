"""RayWorker: a rank in a process that Ray has started, as the engine's process sees it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import re
import threading
from collections.abc import Callable
from typing import Any

from quire.executor.channel import ChannelClosedError
from quire.executor.child_process import SILENT_SECONDS
from quire.executor.messages import Message, MessageError, unpack

_LISTEN_SECONDS = 1.0


class RayWorker:
    """An actor that runs a rank, and a thread that hears what it says.

    Parameters
    ----------
    rank : int
    actor : ray.actor.ActorHandle
        Of a `quire.executor.ray_rank.RayRank`, which has answered already.
    address : str
        Of the machine that it is on.
    lose : callable
        Told once, from a thread, with the rank and why, when the actor is no more, or hangs.
    """

    def __init__(
        self, rank: int, actor: Any, address: str, lose: Callable[[int, str], None]
    ) -> None:
        self.rank = rank
        self.replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._actor = actor
        self._address = address
        self._tell = actor.tell.options(num_returns=0)  # nobody waits: `listen` is told of errors
        self._numbers = itertools.count()
        self._lose = lose
        self._is_ending = False
        self._is_lost = False
        self._listener = threading.Thread(
            target=self._listen, name=f"quire-rank-{rank}", daemon=True
        )
        self._listener.start()

    def _listen(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        why = ""
        try:
            while not why:
                waiting = self._actor.listen.remote(_LISTEN_SECONDS)
                for data in ray.get(waiting, timeout=_LISTEN_SECONDS + SILENT_SECONDS - 1):
                    message = unpack(data)
                    if message["what"] == "failed":
                        why = f"failed: {message['kind']}: {message['text']}"
                    self.replies.put(message)
        except GetTimeoutError:
            why = f"gave no sign of life for {SILENT_SECONDS:g} s"
        except RayError as error:
            why = f"ended: {how_it_ended(error)}"
        except MessageError as error:
            why = f"said what is no message: {error}"
        except Exception as error:  # such as Ray's own end in this process
            why = f"was lost with Ray itself: {type(error).__name__}: {error}"
        self._is_lost = True
        if not self._is_ending:
            self._lose(self.rank, f"on {self._address} {why}")
        self.replies.put(None)

    def send_packed(self, data: bytes) -> None:
        """See `quire.executor.ranks.RemoteRank`."""
        if self._is_lost or self._is_ending:
            raise ChannelClosedError("the actor is no more")
        try:
            self._tell.remote(next(self._numbers), data)
        except Exception as error:  # of many kinds, by what Ray lacks
            raise ChannelClosedError(f"Ray does not bring it any message: {error}") from error

    def end(self) -> None:
        """Bring about its end; nothing there is to be kept."""
        self._is_ending = True
        self.kill()

    def kill(self) -> None:
        """Bring about its end, whatever it does."""
        end_actor(self._actor)

    def join(self, seconds: float) -> None:
        """Wait until Ray knows of its end."""
        self.end()
        if self._listener is not threading.current_thread():
            self._listener.join(seconds)


def end_actor(actor: Any) -> None:
    """End the process of an actor, which may be over."""
    import ray

    with contextlib.suppress(Exception):  # of many kinds, where Ray is gone as well
        ray.kill(actor)


def how_it_ended(error: Exception) -> str:
    """Return what Ray says of an actor's end, without what may be the reason of any."""
    text = str(error)
    found = re.search(r"The actor is dead because (.*?)(?:\. Some common causes|\n|$)", text, re.S)
    said = found[1] if found else text.strip().splitlines()[-1] if text.strip() else ""
    return said or type(error).__name__
