"""The application: endpoints, errors, and what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from quire import __version__
from quire.server.errors import install_error_handlers
from quire.server.middleware import surround
from quire.server.routes import (
    chat,
    completions,
    embeddings,
    health,
    lora,
    metrics,
    models,
    page,
    responses,
    tokenization,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from quire.server.service import Service


class _Application(FastAPI):
    """Puts what surrounds the endpoints outside of all that FastAPI has, errors included."""

    def build_middleware_stack(self) -> ASGIApp:
        return surround(super().build_middleware_stack(), self.state.service)


def build_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service."""
    # The pages of FastAPI's documentation load scripts of other hosts.
    app = _Application(
        title="quire",
        version=__version__,
        root_path=service.settings.root_path,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    install_error_handlers(app)
    endpoints = [models, completions, chat, responses, embeddings, tokenization]
    endpoints += [lora, health, metrics]
    for module in endpoints:
        app.include_router(module.router)
    if service.settings.page:
        app.include_router(page.router)
    return app
