"""Channel: messages between two processes that hold the ends of one pair of sockets.

There is no address that a third could connect to: one end is made here, and the other is handed to
the process that is started for it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

from quire.executor.messages import Message, MessageError, pack, unpack

_HEADER = struct.Struct("<Q")
_LONGEST = 1 << 40


class ChannelClosedError(ConnectionError):
    """Nobody is at the other end any more."""


class ChannelSilentError(ConnectionError):
    """Nothing came for as long as was waited."""


class Channel:
    """One end of a connection; any thread may send, one receives.

    Parameters
    ----------
    connection : socket.socket
        Owned from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Return an end, and the socket that becomes the other."""
        own, other = socket.socketpair()
        return cls(own), other

    def fileno(self) -> int:
        """Return the descriptor, to be watched."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises
        ------
        ChannelClosedError
        """
        self.send_packed(pack(message))

    def send_packed(self, data: bytes) -> None:
        """Send what `pack` made; for one message to several."""
        try:
            with self._sending:
                self._socket.sendall(_HEADER.pack(len(data)))
                self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosedError(f"the other end is gone: {error}") from error

    def receive(self, seconds: float | None = None) -> Message:
        """Wait for the next message.

        Parameters
        ----------
        seconds
            How long nothing may come; None: for ever.

        Raises
        ------
        ChannelClosedError, ChannelSilentError, MessageError
        """
        (size,) = _HEADER.unpack(self._read(_HEADER.size, seconds))
        if size > _LONGEST:
            raise MessageError(f"a message of {size} bytes was announced")
        return unpack(self._read(size, seconds))

    def _read(self, size: int, seconds: float | None) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                # And not by a timeout of the socket's, which sending would have as well.
                if seconds is not None and not select.select([self._socket], [], [], seconds)[0]:
                    raise ChannelSilentError(f"nothing came for {seconds:g} s")
                count = self._socket.recv_into(view)
            except ChannelSilentError:
                raise
            except (OSError, ValueError) as error:
                raise ChannelClosedError(f"the other end is gone: {error}") from error
            if count == 0:
                raise ChannelClosedError("the other end is closed")
            view = view[count:]
        return bytes(data)

    def close(self) -> None:
        """Close this end; who receives at either is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
