"""The web server's protocol, with bounds on what it waits for."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from quire.server.errors import ApiError
from quire.server.settings import Listening

if TYPE_CHECKING:
    _Base: Any = object
else:
    _Base = AutoHTTPProtocol


def guarded_protocol(listening: Listening) -> type[asyncio.Protocol]:
    """Return a protocol class for uvicorn with the bounds of ``listening``."""
    bounds = {
        "head_seconds": listening.header_timeout,
        "head_bytes": listening.max_header_bytes,
        "most_connections": listening.max_connections,
    }
    return type("BoundGuard", (_Guard,), bounds)


class _Guard(_Base):  # type: ignore[misc]
    """Drops connections that do not get to the end of a request's head.

    uvicorn bounds how long a connection is idle between two requests, but not how long half a head
    may lie there, nor (with httptools) how long a head may be.
    """

    head_seconds: float
    head_bytes: int
    most_connections: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, unless there are too many."""
        is_full = len(self.connections) >= self.most_connections
        super().connection_made(transport)
        if is_full:
            self._answer(
                ApiError(
                    503, "too many connections", code="overloaded", headers={"Retry-After": "1"}
                )
            )
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came, unless a head gets too long by it."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._watch():
            self._head_size += len(data)
            if self._head_size > self.head_bytes:
                self._answer(
                    ApiError(
                        431, f"the head of a request may have {self.head_bytes:,} bytes at most"
                    )
                )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_watch()
        super().connection_lost(exc)

    def _watch(self) -> bool:
        """Return whether a head is awaited, and see to it that it comes in time."""
        idle = self.cycle is None or self.cycle.response_complete
        if not idle or self.transport.is_closing():
            self._stop_watch()
            return False
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._drop)
        return True

    def _stop_watch(self) -> None:
        self._head_size = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _drop(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _answer(self, problem: ApiError) -> None:
        """Answer without a request, and close."""
        self._stop_watch()
        body = json.dumps(problem.body()).encode()
        headers = {
            **problem.headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        reason = {431: "Request Header Fields Too Large", 503: "Service Unavailable"}
        lines = [f"HTTP/1.1 {problem.status} {reason[problem.status]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        self.transport.close()
