"""The answer to a request that is refused before its body was read."""

from __future__ import annotations

import anyio
from starlette.types import Receive, Scope, Send

from quire.server.errors import ApiError
from quire.server.record import RECORD

_LINGER_SECONDS = 2.0


def announced_body(scope: Scope) -> tuple[int, bool]:
    """Return how long a request says its body is, 0 where it does not, and whether it has one."""
    length, has_body = 0, False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0  # the web server refuses the others
            has_body |= length > 0
        elif name == b"transfer-encoding":
            has_body = True
    return length, has_body


async def refuse(problem: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error; what the client still sends is thrown away for a moment.

    A connection that is closed with data unread is reset, and the client might never see why.
    """
    record = RECORD.get()
    comes = announced_body(scope)[1] and not (record is not None and record.has_body)
    response = problem.response()
    if comes:
        response.headers["Connection"] = "close"
    await send(
        {"type": "http.response.start", "status": problem.status, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": comes})
    if not comes:
        return
    with anyio.move_on_after(_LINGER_SECONDS):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
