"""A call of an ASGI application within its process, for a request that no socket carries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an application answered.

    Attributes
    ----------
    status : int
    headers : dict of str to str
        By names in lower case.
    body : bytes
    """

    status: int
    headers: dict[str, str]
    body: bytes


async def post(app: Application, path: str, body: bytes) -> Answer:
    """Send JSON to an application, and return its whole answer.

    Parameters
    ----------
    app : ASGI application
    path : str
    body : bytes

    Raises
    ------
    Exception
        What the application raises before it has answered.
    """
    done = asyncio.Event()
    parts: list[bytes] = []
    status, headers, sent = 0, dict[str, str](), False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await done.wait()  # the client stays until it has its answer
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message.get("headers", ()):
                headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                done.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("ascii"),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 80),
    }
    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers an unexpected error, and raises it besides, for the server's log.
        if not done.is_set():
            raise
    return Answer(status, headers, b"".join(parts))
