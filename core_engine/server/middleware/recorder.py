"""Recorder: each request has an id, a line in the log and its place in the metrics."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.middleware.paths import route_path
from quire.server.record import RECORD, RequestRecord

if TYPE_CHECKING:
    from quire.server.service import Service

logger = logging.getLogger("quire.access")

_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_CLIENT_LEFT = 499
"""What stands in the log for a client that went away, as other servers write it."""

_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_PAGE_HEADERS = [
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
]


class Recorder:
    """The outermost layer: sees every request, and every answer's first line.

    Parameters
    ----------
    app : ASGI application
    service : Service
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._logs = service.settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and record it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        scope.setdefault("state", {})["request_id"] = record.request_id
        finished = False

        async def recorded_send(message: Message) -> None:
            nonlocal finished
            if message["type"] == "http.response.start":
                record.status = message["status"]
                _add_headers(message, record.request_id)
            elif not message.get("more_body", False):
                finished = True
            await send(message)

        async def recorded_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                record.has_body = not message.get("more_body", False)
            elif not finished and record.status < 400:  # an error is sent in one piece
                record.left = True
            return message

        token = RECORD.set(record)
        started = time.perf_counter()
        try:
            await self._app(scope, recorded_receive, recorded_send)
        except Exception:
            # The innermost handler has answered and logged it. What is left half is cut off by the
            # web server, which has to know for that.
            if not finished:
                raise
        finally:
            RECORD.reset(token)
            self._record(scope, record, time.perf_counter() - started)

    def _record(self, scope: Scope, record: RequestRecord, seconds: float) -> None:
        status = _CLIENT_LEFT if record.left or not record.status else record.status
        route = scope.get("route")
        handler = getattr(route, "path", None) or "none"
        self._metrics.http.observe(scope["method"], handler, status, seconds)
        if self._logs:
            tokens = ""
            if record.num_prompt_tokens or record.num_generated_tokens:
                tokens = f" {record.num_prompt_tokens}+{record.num_generated_tokens} tokens"
            # As a literal, so that a line feed in a path cannot begin a line of the log.
            path = ascii(route_path(scope))[1:-1]
            logger.info(
                "%s %s %d %.3fs%s %s",
                scope["method"],
                path[:200],
                status,
                seconds,
                tokens,
                record.request_id,
            )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value, "ascii")
    return uuid4().hex


def _add_headers(message: Message, request_id: str) -> None:
    headers = list(message.get("headers", ()))
    names = {name.lower() for name, _ in headers}
    added = [(b"x-request-id", request_id.encode("ascii")), *_HEADERS]
    if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
        added += _PAGE_HEADERS
    message["headers"] = headers + [header for header in added if header[0] not in names]
