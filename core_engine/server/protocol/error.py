"""What an error looks like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An answer that is an error."""

    error: ErrorDetail


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {"model": ErrorResponse, "description": "The server cannot serve it now."},
}
"""For ``responses=`` of an endpoint."""
