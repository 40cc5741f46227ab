"""Body: a request's body is read before anything is done, within bounds of size and time."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import ApiError
from quire.server.middleware.refusal import announced_body, refuse
from quire.server.settings import ServerSettings


class Body:
    """Reads bodies, and refuses those that are too long or come too slowly.

    Parameters
    ----------
    app : ASGI application
    settings : ServerSettings
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._limit = settings.max_body_bytes
        self._seconds = settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose body has come whole, or answer it with 413 or 408."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length, has_body = announced_body(scope)
        if not has_body:
            await self._app(scope, receive, send)
            return
        if length > self._limit:
            await refuse(self._too_long(), scope, receive, send)
            return
        chunks: list[bytes] = []
        size = 0
        with anyio.move_on_after(self._seconds) as deadline:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > self._limit:
                    break
                chunks.append(chunk)
                if not message.get("more_body", False):
                    break
        if deadline.cancelled_caught:
            problem = ApiError(408, f"the body did not come within {self._seconds:g} seconds")
            await refuse(problem, scope, receive, send)
            return
        if size > self._limit:
            chunks.clear()
            await refuse(self._too_long(), scope, receive, send)
            return

        whole: Message | None = {
            "type": "http.request",
            "body": chunks[0] if len(chunks) == 1 else b"".join(chunks),
            "more_body": False,
        }
        del chunks

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        await self._app(scope, replay, send)

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"a request may have {self._limit:,} bytes at most", code="request_too_large"
        )
