"""``/``: a page to chat with the model and to see what the server does."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from quire.server.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).resolve().parents[1] / "page"
_TYPES = {
    "icon.svg": "image/svg+xml",
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    # Nothing but these files and this server's answers, whatever a model says.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


@router.api_route("/", methods=["GET", "HEAD"])
async def index() -> Response:
    """Return the page, which needs no key: what it asks for does."""
    return await file("index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def file(name: str) -> Response:
    """Return one of the files that the page is made of."""
    if name not in _TYPES:
        raise ApiError(404, f"the page has no file {name!r}")
    return Response(_read(name), media_type=_TYPES[name], headers=_HEADERS)
