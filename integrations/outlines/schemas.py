"""JSON schemas as Outlines means them: an object has the members that are named, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from quire.structured_outputs import StructuredOutputsParams

_GENSON_DIALECT: Final = "http://json-schema.org/schema#"
"""What genson writes unless it is told otherwise; there is no dialect of that name."""

_APPLIED_TOGETHER: Final = frozenset(
    ("allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef")
)
"""Keywords by which one schema looks at members that another one names, or counts on it."""

_MEMBERS: Final = frozenset(("properties", "required"))
_ALTERNATIVES: Final = ("anyOf", "oneOf")
_BY_NAME: Final = frozenset(("properties", "$defs", "definitions"))
"""Keywords whose values have names that are no keywords."""
_VALUES: Final = frozenset(("const", "default", "enum", "examples"))
"""Keywords with values in which nothing is one."""


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema by which objects have no members but those that are named.

    A text that matches it matches the schema as it was. Left to the letter of the standard, a
    model may go on with members of its own invention until it runs out of room.

    What it says of further members stays; and all of it stays where schemas are combined in ways
    by which a closed one could contradict another.

    Raises
    ------
    InvalidRequestError
        For what is no schema, or is too long or too deep.
    """
    StructuredOutputsParams(json=schema)
    if schema.get("$schema") == _GENSON_DIALECT:
        schema = {name: value for name, value in schema.items() if name != "$schema"}
    return _closed(schema) if _may_close(schema) else schema


def _may_close(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        together = _APPLIED_TOGETHER & schema.keys()
        if "discriminator" in schema:
            together -= {"oneOf"}  # a constant tells them apart, closed or not
        if together or (schema.keys() & _MEMBERS and schema.keys() & {"$ref", *_ALTERNATIVES}):
            return False
        return all(
            all(map(_may_close, value.values()))
            if name in _BY_NAME and isinstance(value, Mapping)
            else name in _VALUES or _may_close(value)
            for name, value in schema.items()
        )
    return not isinstance(schema, list) or all(map(_may_close, schema))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for name in _BY_NAME:
        if isinstance(result.get(name), Mapping):
            result[name] = {key: _closed(inner) for key, inner in result[name].items()}
    for name in ("items", "additionalProperties"):
        if name in result:
            result[name] = _closed(result[name])
    for name in (*_ALTERNATIVES, "prefixItems"):
        if isinstance(result.get(name), list):
            result[name] = [_closed(inner) for inner in result[name]]
    properties, required = result.get("properties"), result.get("required", [])
    if (
        isinstance(properties, Mapping)
        and not {"additionalProperties", "minProperties", "patternProperties"} & result.keys()
        and isinstance(required, (list, tuple))
        and all(isinstance(name, str) and name in properties for name in required)
    ):
        result["additionalProperties"] = False
    return result
