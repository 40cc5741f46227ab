"""RequestBody, and what becomes of fields that nothing can be made of."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast

from quire.server.errors import ApiError
from quire.utils.checks import shown
from quire.utils.suggest import nearest

if TYPE_CHECKING:
    from quire.server.service import Service

logger = logging.getLogger("quire")

_MOST_LOGGED: Final = 1000
_logged: set[str] = set()
"""Unknown fields that the log has named: a client sends the same ones with every request."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
"""An integer as JSON knows them: 1.0 is one, "1" and true are none."""


class _FirstAlone(FailFast):
    __hash__ = object.__hash__  # a union with None needs one


Ints = Annotated[list[Int], _FirstAlone()]
"""Several of them. Only the first wrong one is told: an error for each of a million would take
gigabytes, and seconds of the event loop."""
Strings = Annotated[list[str], _FirstAlone()]


class RequestBody(BaseModel):
    """The body of a request.

    A field that is left out is None, and so is one that is null. Types are strict. Fields that
    are not declared are kept, for :func:`accept_fields` to name.

    Attributes
    ----------
    refused : dict
        Fields that are known and cannot be honoured, with the reason. Left out, null, false and
        empty ask for nothing, and pass.
    """

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    refused: ClassVar[dict[str, str]] = {}


def accept_fields(request: Request, body: RequestBody, service: Service) -> None:
    """Refuse fields that cannot be honoured; have the answer and the log name unknown ones.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    for name, reason in body.refused.items():
        value = getattr(body, name, None)
        if value is not None and value is not False and value not in ("", [], {}):
            raise ApiError(
                400,
                f"{name} is not supported: {reason}",
                param=name,
                code="unsupported_parameter",
            )
    unknown = unknown_fields(body)
    if not unknown:
        return
    if service.settings.strict_fields:
        name, valid = next(iter(unknown.items()))
        guess = nearest(name.rpartition(".")[2], valid)
        hint = "" if guess is None else f": did you mean {guess!r}?"
        raise ApiError(
            400, f"unknown field {shown(name)}{hint}", param=name, code="unknown_parameter"
        )
    request.state.unknown_fields = list(unknown)
    new = [name for name in unknown if name not in _logged]
    if new and len(_logged) < _MOST_LOGGED:
        _logged.update(new[:50])
        logger.warning("fields that nobody knows, and that change nothing: %s", shown(new))


def unknown_fields(body: BaseModel, prefix: str = "") -> dict[str, list[str]]:
    """Return the paths of fields that no model declares, each with the names that it could be."""
    valid = list(type(body).model_fields)
    found = {prefix + name: valid for name in body.model_extra or ()}
    for name in body.model_fields_set:
        value = getattr(body, name, None)
        if isinstance(value, BaseModel):
            found.update(unknown_fields(value, f"{prefix}{name}."))
    return found
