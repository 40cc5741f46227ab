"""ApiError, and every other error as an OpenAI client expects it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quire.errors import EngineBusyError, EngineClosedError, InvalidRequestError, QuireError
from quire.utils.checks import shown

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger("quire")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status : int
        The HTTP status.
    message : str
        Says what is wrong, and what would be right.
    param : str, optional
        The field that it is about.
    code : str, optional
        A word for programs, such as ``"model_not_found"``.
    headers : mapping, optional
        Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Return any error as an answer; one that is nobody's fault but ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error))
    if isinstance(error, EngineBusyError):
        seconds = str(max(1, round(error.retry_after)))
        return ApiError(503, str(error), code="overloaded", headers={"Retry-After": seconds})
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="engine_closed")
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, QuireError):
        logger.error("%s", error)  # whoever runs the server has to see it, too
        return ApiError(500, str(error))
    logger.error("a request failed by a defect of the server", exc_info=error)
    return ApiError(500, "the server failed on this request; its log has the reason")


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    name = _field_path(first["loc"])
    message = first["msg"]
    if first["type"] == "missing":
        message = f"{name or 'a body'} is required"
    elif first["type"] == "value_error":
        message = f"{name} {message.removeprefix('Value error, ')}"
    else:
        message = f"{name}: {message}, got {shown(first.get('input'))}"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=name or None)


def _field_path(parts: Sequence[str | int]) -> str:
    """Return where a field stands in a body, as ``messages[0].content``."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "body" or path:
            path += f".{part}" if path else part
    return path


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of an application be answered in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, QuireError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
