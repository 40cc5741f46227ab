"""The application: endpoints, errors, and what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from quire import __version__
from quire.server.errors import install_error_handlers
from quire.server.routes import chat, completions, models, tokenization

if TYPE_CHECKING:
    from quire.server.service import Service


def build_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service."""
    app = FastAPI(title="quire", version=__version__)
    app.state.service = service
    install_error_handlers(app)
    for module in (models, completions, chat, tokenization):
        app.include_router(module.router)
    return app
