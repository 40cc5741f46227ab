"""Auth: whoever asks has to send a key."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.server.errors import ApiError
from quire.server.middleware.paths import PROBES, route_path
from quire.server.middleware.refusal import refuse
from quire.server.settings import ServerSettings

PAGE_PATHS = ("/page/",)
"""Under these are the files of the page, which hold nothing of anybody's."""


class Auth:
    """Refuses requests without one of the keys.

    The probes are open, and so are the page's own files: it asks its reader for the key.

    Parameters
    ----------
    app : ASGI application
    settings : ServerSettings
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._digests = [_digest(key.encode("ascii")) for key in settings.api_keys]
        self._open = set(PROBES)
        self._open_prefixes: tuple[str, ...] = ()
        if settings.open_metrics:
            self._open.add("/metrics")
        if settings.page:
            self._open.add("/")
            self._open_prefixes = PAGE_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer it with 401."""
        if scope["type"] == "http":
            path = route_path(scope)
            is_open = path in self._open or path.startswith(self._open_prefixes)
            if not is_open:
                problem = self._problem(scope)
                if problem is not None:
                    await refuse(problem, scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) == 1:
            kind, _, token = values[0].partition(b" ")
            if kind.lower() == b"bearer" and self._knows(token.strip()):
                return None
            message = "the API key is not one of this server's"
        else:
            message = "an API key is needed: send the header 'Authorization: Bearer KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=headers)

    def _knows(self, token: bytes) -> bool:
        """Compare with every key, each in the same time whatever it is and how long it is."""
        digest = _digest(token)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
