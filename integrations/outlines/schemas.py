"""JSON schemas as Outlines means them: an object has the members that are named, and no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

_GENSON_DIALECT: Final = "http://json-schema.org/schema#"
"""What genson writes for "the newest"; it is the name of no dialect."""

_LOOK_AT_OTHERS: Final = frozenset(
    ("$dynamicRef", "allOf", "dependentSchemas", "if", "not", "oneOf", "unevaluatedProperties")
)
"""Keywords by which a part that allows less can make the whole allow nothing, or more."""

_OPEN: Final = ("$ref", "additionalProperties", "anyOf", "minProperties", "patternProperties")
"""Keywords of an object that speak of other members than ``properties`` does."""


def read_schema(text: str) -> dict[str, Any]:
    """Return a schema in which an object that says nothing of further members has none.

    A text that matches it matches the schema as it was. Left to the letter of the standard, a
    model may go on with members of its own invention until it runs out of room.

    Parameters
    ----------
    text : str
        A JSON schema.

    Returns
    -------
    dict
    """
    schema = json.loads(text)
    if not isinstance(schema, dict):  # true or false
        return {} if schema else {"not": {}}
    if schema.get("$schema") == _GENSON_DIALECT:
        del schema["$schema"]
    closed: dict[str, Any] = schema if _looks_at_others(schema) else _closed(schema)
    return closed


def _looks_at_others(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_looks_at_others, value))
    if not isinstance(value, Mapping):
        return False
    found = _LOOK_AT_OTHERS & value.keys()
    if "discriminator" in value:
        found -= {"oneOf"}  # a constant tells the alternatives apart
    return bool(found) or any(map(_looks_at_others, value.values()))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(schema.get(name), dict):
            closed[name] = {key: _closed(inner) for key, inner in schema[name].items()}
    for name in ("additionalProperties", "items"):
        if name in schema:
            closed[name] = _closed(schema[name])
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(name), list):
            closed[name] = [_closed(inner) for inner in schema[name]]
    members = schema.get("properties")
    if isinstance(members, dict) and not any(name in schema for name in _OPEN):
        required = schema.get("required", [])
        if isinstance(required, list) and all(name in members for name in required):
            closed["additionalProperties"] = False
    return closed
