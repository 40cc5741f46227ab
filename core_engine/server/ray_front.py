"""The front of a Ray Serve application: takes HTTP requests, and hands each to a replica.

It reads a request's body, for Ray Serve's router to see what the prompt begins with, and passes the
replica's answer on as it comes. All else is the replica's: keys, checks, errors.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from quire.server.errors import ApiError
from quire.server.middleware.refusal import refuse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_MOST_BYTES = 8192
"""Of a prompt's beginning that are looked at."""


class Front:
    """An ASGI application that answers by replicas.

    Parameters
    ----------
    replicas : ray.serve.handle.DeploymentHandle
    max_body_bytes : int
        Longest body; a longer one is not read.
    """

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            return
        body = await _read(receive, self._max_body_bytes)
        if body is None:
            problem = ApiError(413, f"a body may have {self._max_body_bytes:,} bytes at most")
            await refuse(problem, scope, receive, send)
            return
        names = ("method", "path", "raw_path", "query_string", "headers", "scheme", "root_path")
        asked: dict[str, Any] = {name: scope[name] for name in names if name in scope}
        asked["http_version"] = scope.get("http_version", "1.1")
        asked["client"], asked["server"] = scope.get("client"), scope.get("server")
        asked["body"] = body
        asked["beginning"] = prompt_beginning(scope["method"], body)
        async for message in self._replicas.remote(asked):
            await send(message)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _read(receive: Receive, most: int) -> bytes | None:
    """Return a request's body; None where it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body"):
            return bytes(body)


def prompt_beginning(method: str, body: bytes) -> bytes:
    """Return what a request's prompt begins with; nothing where there is none.

    Two of equal beginnings have cached tokens in common: of one model, or adapter; tools stand
    before messages in all templates.
    """
    if method != "POST":
        return b""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return b""  # which the replica will say
    if not isinstance(fields, Mapping):
        return b""
    for name in ("messages", "prompt", "input"):
        if fields.get(name):
            said = [fields.get("model"), fields.get("tools"), fields[name]]
            return json.dumps(said)[:_MOST_BYTES].encode()
    return b""


async def run_app(app: Any, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Have an ASGI application answer what a `Front` was asked, message by message.

    Leaving the iterator ends the request, as a client does that goes away.
    """
    import asyncio

    body = asked.pop("body")
    del asked["beginning"]
    scope = {
        **asked, "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
        "headers": [tuple(each) for each in asked["headers"]], "state": {},
    }  # fmt: skip
    messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(maxsize=16)
    gone = asyncio.Event()
    has_body = False

    async def receive() -> dict[str, Any]:
        nonlocal has_body
        if not has_body:
            has_body = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app(scope, receive, messages.put)
        finally:
            await messages.put(None)

    task = asyncio.create_task(work())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task  # for its error
    finally:
        gone.set()
        if not task.done():
            task.cancel()
            while not task.done():  # what it says to nobody must not hold it up
                while not messages.empty():
                    messages.get_nowait()
                await asyncio.wait([task], timeout=0.05)
