"""Schemas of functions' arguments, as grammars enforce them."""

from __future__ import annotations

import json
from typing import Any, Final

from quire.errors import InvalidRequestError

_LARGEST_EXACT: Final = 2**53
_INTERSECTIONS: Final = frozenset(
    ("allOf", "if", "dependentSchemas", "dependencies", "unevaluatedProperties")
)
"""Keywords by which an object has to match several schemas: to close one would empty them all."""

_BESIDE: Final = frozenset(("$ref", "anyOf", "oneOf"))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without members that it does not name.

    An object's schema that says nothing of other members allows any, which weak models make use
    of without end. What matches the result matches the schema.
    """
    return _closed(schema) if _may_close(schema) else schema


def _may_close(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(map(_may_close, schema))
    if not isinstance(schema, dict):
        return True
    if not _INTERSECTIONS.isdisjoint(schema):
        return False
    if "properties" in schema and not _BESIDE.isdisjoint(schema):
        return False
    return all(map(_may_close, schema.values()))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    inner = dict(schema)
    for word in ("properties", "$defs", "definitions"):
        if isinstance(inner.get(word), dict):
            inner[word] = {name: _closed(item) for name, item in inner[word].items()}
    for word in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(inner.get(word), list):
            inner[word] = [_closed(item) for item in inner[word]]
    for word in ("items", "additionalProperties"):
        if word in inner:
            inner[word] = _closed(inner[word])
    if isinstance(inner.get("properties"), dict) and "patternProperties" not in inner:
        inner.setdefault("additionalProperties", False)
    return inner


def refuse_rounded(where: str, schema: Any) -> None:
    """Refuse integers that llguidance would round: it keeps the numbers of a schema as floats."""
    level = [schema]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            level.extend(item.values())
        elif isinstance(item, list):
            level.extend(item)
        elif isinstance(item, int) and abs(item) > _LARGEST_EXACT:
            raise InvalidRequestError(
                f"{where} has an integer beyond 2**53, {json.dumps(item)[:50]}, which llguidance "
                "rounds"
            )
