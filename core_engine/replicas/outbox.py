"""Outbox: messages to another process, sent by a thread, so that nobody else waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

from quire.executor.channel import Channel, ChannelClosedError
from quire.executor.messages import Message, pack, unpack


class Outbox:
    """Sends what it is given, in order; what came meanwhile goes together.

    Parameters
    ----------
    channel : Channel
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # Of a kind that a finalizer may put into at any moment.
        self._packed: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="quire-outbox", daemon=True)
        self._thread.start()

    def put(self, message: Mapping[str, Any]) -> None:
        """Send a message, some time soon; any thread may.

        Raises
        ------
        TypeError, ValueError, OverflowError
            There is something in it that no message can have.
        """
        self._packed.put(pack(message))

    def close(self, seconds: float) -> None:
        """Wait for a while until all is sent."""
        self._packed.put(None)
        self._thread.join(seconds)

    def _send(self) -> None:
        is_open = True
        while is_open:
            batch: list[bytes] = []
            data = self._packed.get()
            while True:
                if data is None:
                    is_open = False
                    break
                batch.append(data)
                try:
                    data = self._packed.get_nowait()
                except queue.Empty:
                    break
            if batch:
                try:
                    self._channel.send({"what": "batch", "messages": batch})
                except ChannelClosedError:  # who listens to the other end is told
                    return


def messages_of(batch: Message) -> list[Message]:
    """Return what was put into an outbox, of a message that came from it."""
    return [unpack(data) for data in batch["messages"]]
