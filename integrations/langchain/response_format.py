"""OpenAI's ``response_format`` as a constraint of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema

from quire.errors import InvalidRequestError
from quire.integrations.langchain.recursive_schemas import recursive_schema
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import refuse

_EXPECTED = (
    "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': "
    "{'name': ..., 'schema': {...}}}, or a pydantic model or TypedDict"
)


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of a class, a function in OpenAI's shape, or a JSON schema.

    Raises
    ------
    InvalidRequestError
        For what has none.
    """
    if isinstance(schema, Mapping) and not {"name", "function", "json_schema"} & {*schema}:
        return {**schema}  # LangChain's conversion asks for a title, and knows objects only
    recursive = recursive_schema(schema)
    if recursive is not None:
        return recursive
    try:
        return convert_to_json_schema(schema)
    except Exception as error:  # of several kinds, by what it is
        raise InvalidRequestError(f"schema is none: {error}") from error


def schema_format(schema: dict[str, Any], *, strict: bool | None = None) -> dict[str, Any]:
    """Return the ``response_format`` that asks for JSON of this schema.

    Unless ``strict`` is False, objects in it have no members that the schema does not name: weak
    models would make them up without end.
    """
    from quire.chat.schemas import closed

    shape = schema if strict is False else closed(schema)
    inner: dict[str, Any] = {"name": str(schema.get("title", "answer")), "schema": shape}
    if strict is not None:
        inner["strict"] = strict
    return {"type": "json_schema", "json_schema": inner}


def response_constraint(response_format: Any, backend: str) -> StructuredOutputsParams | None:
    """Return what an answer has to match; None where it is free.

    Parameters
    ----------
    response_format : dict, class or None
        In the shape of OpenAI's chat completions, or a class that has a JSON schema.
    backend : str
        The library that the engine enforces structures with.

    Raises
    ------
    InvalidRequestError
        For any other.
    """
    if response_format is None:
        return None
    # More than a space between the parts of JSON is how weak models run on.
    compact: dict[str, Any] = {} if backend == "xgrammar" else {"whitespace_pattern": "[ ]?"}
    if isinstance(response_format, type):
        return StructuredOutputsParams(json=json_schema(response_format), **compact)
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, **compact)
    if kind != "json_schema":
        raise refuse("response_format", response_format, _EXPECTED)
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise refuse("response_format", response_format, _EXPECTED)
    return StructuredOutputsParams(json={**schema}, **compact)
