"""JSON schemas of what ``generate.json`` takes: models, functions, enumerations and schemas."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import operator
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypedDict, is_typeddict

from quire.errors import InvalidRequestError
from quire.integrations.outlines.schemas import closed
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import refuse, shown

_EXPECTED: Final = (
    "a pydantic model, a JSON schema (a string or a dict), a function, an Enum, a dataclass, "
    "a TypedDict or a genson SchemaBuilder"
)

_TYPED_DICT: Final[Any] = TypedDict  # called with what a checker cannot know


def is_term(value: object, name: str = "Term") -> bool:
    """Return whether a value is of that class of Outlines' types, without importing Outlines."""
    module = sys.modules.get("outlines.types.dsl")
    return module is not None and isinstance(value, getattr(module, name))


def schema_of(value: Any) -> tuple[dict[str, Any] | str, Callable[[str], Any]]:
    """Return the schema that a value stands for, and what makes a result of a text.

    Parameters
    ----------
    value : object
        See the functions of ``generate``.

    Returns
    -------
    schema : dict or str
        Objects of which it does not say that they may have further members have none.
    parse : callable
        Returns an instance of a pydantic model, and plain JSON values for all else.

    Raises
    ------
    InvalidRequestError
        For what stands for no schema.
    """
    try:
        return _schema_of(value)
    except InvalidRequestError:
        raise
    except Exception as error:  # pydantic's, genson's, and those of the user's own code in them
        raise InvalidRequestError(
            f"schema_object must be {_EXPECTED}; {shown(value)} makes no schema: {error}"
        ) from error


def _schema_of(value: Any) -> tuple[dict[str, Any] | str, Callable[[str], Any]]:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return closed(value.model_json_schema()), value.model_validate_json
    if is_term(value, "JsonSchema"):
        value = value.schema
    if isinstance(value, Mapping):
        return closed(dict(value)), json.loads
    if isinstance(value, str):
        return _read(value), json.loads
    if isinstance(value, type) and issubclass(value, Enum):
        return _of_enum(value), json.loads
    if is_typeddict(value):
        return closed(TypeAdapter(value).json_schema()), json.loads
    if hasattr(value, "add_object") and hasattr(value, "to_schema"):
        return closed(value.to_schema()), json.loads
    is_function = callable(value) and not isinstance(value, type) and get_origin(value) is None
    if is_function or (isinstance(value, type) and dataclasses.is_dataclass(value)):
        return closed(TypeAdapter(_arguments_of(value)).json_schema()), json.loads
    raise refuse("schema_object", value, _EXPECTED)


def _read(text: str) -> dict[str, Any] | str:
    StructuredOutputsParams(json=text)  # refuses what is no schema, too long or too deep to read
    schema = json.loads(text)
    return closed(schema) if isinstance(schema, dict) else text


def _of_enum(value: type[Enum]) -> dict[str, Any]:
    """Return the schema of one of the values, or of the arguments of one of the functions."""
    members = list(value)
    if not members:
        raise refuse(
            "schema_object",
            value,
            "an Enum with members; a function becomes one by functools.partial",
        )
    functions = [_arguments_of(member.value) for member in members if callable(member.value)]
    values = [member.value for member in members if not callable(member.value)]
    if not functions:
        return {"title": value.__name__, "enum": values}
    # Through one union, so that their definitions are in one place.
    union: Any = functools.reduce(operator.or_, functions)
    schema = closed(TypeAdapter(union).json_schema())
    if values:
        definitions = schema.pop("$defs", {})
        schema = {"anyOf": [schema, {"enum": values}], "$defs": definitions}
    return {"title": value.__name__, **schema}


def _arguments_of(function: Callable[..., Any]) -> Any:
    """Return a TypedDict of a function's arguments, each of them required."""
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", "Arguments")
    bound = function.keywords if isinstance(function, functools.partial) else {}
    hinted = plain if inspect.isroutine(plain) or isinstance(plain, type) else type(plain).__call__
    try:
        signature = inspect.signature(function)
        hints = get_type_hints(hinted, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise InvalidRequestError(
            f"the arguments of {name} cannot be told from its signature: {error}"
        ) from error
    arguments: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name in bound:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InvalidRequestError(
                f"{name} has the argument {str(parameter)!r}, which is not given by its name"
            )
        if parameter.name not in hints:
            raise InvalidRequestError(
                f"{name} must have a type annotation for each argument; {parameter.name!r} has none"
            )
        arguments[parameter.name] = hints[parameter.name]
    # No model: arguments may have names that a model has for methods.
    typed: Any = _TYPED_DICT(name, arguments)
    typed.__pydantic_config__ = ConfigDict(extra="forbid")
    return typed
