"""EventStream: an answer of server-sent events, in the way that OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from quire.server.disconnect import Receive, until_disconnect
from quire.server.errors import ApiError, as_api_error

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DONE: Final = b"data: [DONE]\n\n"

_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy is not to gather events
}

# One encoder for all: json.dumps would make one per call for these options.
_encode: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
).encode


def to_json(value: Any) -> bytes:
    """Return a value as JSON, in UTF-8."""
    return _encode(value).encode()


def event(data: Any, name: str | None = None) -> bytes:
    """Return one event.

    Parameters
    ----------
    data : object
        Written as JSON.
    name : str, optional
        The event's type, for clients that go by it.
    """
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_encode(data)}\n\n".encode()


def json_response(value: Any) -> Response:
    """Return an answer in JSON that is made of plain data alone."""
    return Response(to_json(value), media_type="application/json")


async def stream_response(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """Wait for the first events, and return the answer that sends them and the rest.

    An error before the first event is raised, so that it has a status of its own; an error after
    it is an event.

    Parameters
    ----------
    request : Request
        Whose client is watched, from here on until the end: when it goes away, ``events`` is
        closed.
    events : async generator of bytes
        One or more events at a time. The last of them, if all goes well, is up to it.
    """
    try:
        first = await until_disconnect(request.receive, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    async for item in events:
        return item
    return b""


class EventStream(Response):
    """An answer of events; made by :func:`stream_response`.

    Nothing is gathered: an event is asked for when the server has taken the one before, which it
    does as the client reads.
    """

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._first = first
        self._events = events

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the events; end early, and quietly, when the client is gone."""
        try:
            async with aclosing(self._events):
                await until_disconnect(receive, self._write(send))
        except (ApiError, OSError):
            pass  # the client is gone

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body = {"type": "http.response.body", "body": self._first, "more_body": True}
        await send(body)
        events = self._events
        while True:
            try:
                item = await anext(events, None)
            except Exception as error:
                item = event(as_api_error(error).body())
                await send({**body, "body": item})
                break
            if item is None:
                break
            await send({**body, "body": item})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
