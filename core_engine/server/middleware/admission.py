"""Admission: requests come in while the server lives, and have their time."""

from __future__ import annotations

import asyncio
import json

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import ApiError
from quire.server.life import Life
from quire.server.middleware.paths import PROBES, route_path
from quire.server.middleware.refusal import refuse
from quire.server.settings import ServerSettings

_FAREWELL_SECONDS = 1.0
"""How long the end of a stream waits for a client that does not read."""


class Admission:
    """Refuses new requests when the server ends, and ends those that last too long.

    Parameters
    ----------
    app : ASGI application
    life : Life
    settings : ServerSettings
    """

    def __init__(self, app: ASGIApp, life: Life, settings: ServerSettings) -> None:
        self._app = app
        self._life = life
        self._seconds = settings.request_timeout
        self._retry_after = settings.retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer it with 503 or 504."""
        if scope["type"] != "http" or route_path(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        if self._life.ending is not None:
            await refuse(self._ending(), scope, receive, send)
            return

        is_stream: bool | None = None  # once the answer has begun

        async def watched_send(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                kinds = [value for name, value in message["headers"] if name == b"content-type"]
                is_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
            await send(message)

        with self._life.request(self._seconds) as running:
            try:
                await self._app(scope, receive, watched_send)
            except asyncio.CancelledError:
                if not running.is_own():
                    raise
            else:
                return
        problem = self._late() if running.late else self._ending()
        if is_stream is None:
            await refuse(problem, scope, receive, send)
        elif is_stream:
            with anyio.move_on_after(_FAREWELL_SECONDS):
                event = f"data: {json.dumps(problem.body())}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": False})

    def _ending(self) -> ApiError:
        headers = {"Retry-After": f"{self._retry_after:.0f}", "Connection": "close"}
        return ApiError(503, f"{self._life.ending}", code="shutting_down", headers=headers)

    def _late(self) -> ApiError:
        return ApiError(
            504, f"the answer took longer than {self._seconds:g} seconds", code="request_timeout"
        )
