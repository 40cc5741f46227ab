"""JsonRoute: an endpoint whose body is JSON that can be trusted to be JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from quire.server.disconnect import client_gone
from quire.server.errors import ApiError

_DEEPEST: Final = 200
"""Most levels of a body: what reads it further may do so by recursion."""

_BRACKETS: Final = re.compile(r'"(?:\\.|[^"\\])*"|([\[{])|[\]}]', re.DOTALL)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_JSON_TYPE: Final = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)

UNKNOWN_HEADER: Final = "x-quire-unknown-fields"


class JsonRoute(APIRoute):
    """A route that reads its body by :func:`load_object`, and names unknown fields in its answer.

    For ``APIRouter(route_class=JsonRoute)``; the endpoint takes a
    :class:`quire.server.fields.RequestBody` and hands it to
    :func:`quire.server.fields.accept_fields`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is None:
                return await handler(request)
            try:
                content = await request.body()
            except ClientDisconnect:
                raise client_gone() from None
            _check_type(request.headers.get("content-type", ""))
            parsed = _ParsedRequest(request.scope, request.receive, content)
            response = await handler(parsed)
            unknown: list[str] = getattr(parsed.state, "unknown_fields", [])
            if unknown:
                response.headers[UNKNOWN_HEADER] = header_list(unknown)
            return response

        return handle


class _ParsedRequest(Request):
    def __init__(self, scope: Any, receive: Any, content: bytes) -> None:
        super().__init__(scope, receive)
        self._body = content
        self._value = load_object(content)

    async def json(self) -> Any:
        return self._value


def header_list(names: list[str]) -> str:
    """Return names as a header's value, whatever is in them; at most some 2,000 characters."""
    text = ", ".join(quote(name[:100], safe=".[]") for name in names[:50])
    return text[:2000]


def _check_type(content_type: str) -> None:
    # A page in a browser may post other types to any host, without asking it first.
    if not _JSON_TYPE.match(content_type):
        raise ApiError(
            415,
            f"the header Content-Type must be application/json, got {content_type[:100]!r}",
            code="unsupported_media_type",
        )


def load_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises
    ------
    ApiError
        400: it is none, or has what JSON has not (NaN, lone surrogates), or is nested too deeply.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _bad(f"it is not UTF-8, at byte {error.start}") from None
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise _bad("it is nested too deeply") from None
    except ValueError as error:
        raise _bad(f"it is not JSON: {error}") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            raise _bad(f"it holds a lone surrogate, {character!r}, which is no character") from None
    if not isinstance(value, dict):
        raise _bad(f"it must be a JSON object, not {type(value).__name__}")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        if match[1]:
            depth += 1
            if depth > _DEEPEST:
                raise _bad(f"it is nested more than {_DEEPEST} levels deep")
        elif match[0][0] != '"':
            depth -= 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:50]} is larger than any number here")
    return value


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"the body cannot be read: {reason}", code="invalid_json")
