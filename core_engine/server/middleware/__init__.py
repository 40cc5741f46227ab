"""What surrounds the endpoints: plain ASGI applications, one inside the other.

Nothing here looks into what an answer streams, so that a chunk costs a function call per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from quire.server.middleware.admission import Admission
from quire.server.middleware.auth import Auth
from quire.server.middleware.body import Body
from quire.server.middleware.recorder import Recorder

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from quire.server.service import Service

__all__ = ["surround"]


def surround(app: ASGIApp, service: Service) -> ASGIApp:
    """Return an application inside all layers; the outermost one is made last."""
    settings = service.settings
    app = Body(app, settings)
    if settings.api_keys:
        app = Auth(app, settings)
    app = Admission(app, service.life, settings)
    if settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=("X-Request-Id",),
        )
    return Recorder(app, service)
