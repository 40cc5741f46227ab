"""The schemas within a JSON schema, which are not all that looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

_ONE: Final = (
    *(
        "additionalItems",
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
    ),
    *("not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_LISTS: Final = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS: Final = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


class Kept(NamedTuple):
    """A schema of which something was dropped.

    Attributes
    ----------
    schema : dict or bool
    dropped : list of str
        The keywords, each once.
    """

    schema: Any
    dropped: list[str]


def without(schema: Any, keep: Callable[[dict[str, Any]], dict[str, Any]]) -> Kept:
    """Return a schema of which each subschema is what ``keep`` makes of it."""
    dropped: dict[str, None] = {}

    def rebuilt(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        kept = keep(schema)
        dropped.update(dict.fromkeys(word for word in schema if word not in kept))
        return {word: inner(word, value) for word, value in kept.items()}

    def inner(word: str, value: Any) -> Any:
        if word in _MAPS and isinstance(value, dict):
            return {name: rebuilt(item) for name, item in value.items()}
        if word in _LISTS and isinstance(value, list):
            return [rebuilt(item) for item in value]
        return rebuilt(value) if word in _ONE else value

    kept = rebuilt(schema)
    return Kept(kept, list(dropped))


def subschemas(schema: Any) -> list[dict[str, Any]]:
    """Return a schema and those within it."""
    found: list[dict[str, Any]] = []

    def note(schema: dict[str, Any]) -> dict[str, Any]:
        found.append(schema)
        return schema

    without(schema, note)
    return found
