"""Which JSON schemas a regex expresses in full, so that none of their keywords is passed over."""

from __future__ import annotations

import json
import re
from typing import Any, Final

NOTES: Final = frozenset(
    ("title", "description", "default", "examples", "$schema", "$comment", "$defs", "definitions")
)
"""Keywords that say nothing of what is valid here."""

KEYWORDS_BY_TYPE: Final[dict[str, frozenset[str]]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength")),
    "integer": frozenset(),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_VALUES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def why_open(schema: Any) -> str | None:
    """Return what a schema says that its regex would not, or None.

    An object may have fewer members than the schema allows, which is valid all the same.
    """
    try:
        return _why_open(schema)
    except (AttributeError, TypeError) as error:  # no schema, by the type of a keyword's value
        return f"what is no JSON schema ({error})"


def _why_open(schema: Any) -> str | None:
    if not isinstance(schema, dict):
        return f"the schema {schema!r}"
    for name in ("$defs", "definitions"):
        for inner in schema.get(name, {}).values():
            if (reason := _why_open(inner)) is not None:
                return reason
    keywords = set(schema) - NOTES
    form = keywords & {"anyOf", "enum", "const", "$ref"}
    if not form:
        return _why_type_open(schema, keywords)
    if len(form) > 1 or not keywords <= form | {"type"}:
        return f"all of {sorted(keywords)} together"
    if form == {"anyOf"} and keywords == form:
        return next((r for item in schema["anyOf"] if (r := _why_open(item)) is not None), None)
    if form == {"$ref"} and keywords == form:
        # Any other is taken for a schema of anything.
        local = re.fullmatch(r"#/(\$defs|definitions)/[^/%~]+", str(schema["$ref"]))
        return None if local else f"the reference {schema['$ref']!r}"
    values = schema.get("enum", [schema.get("const")])
    kinds = _VALUES.get(schema.get("type", ""), (str, int, float, bool, type(None)))
    if "type" in schema and not isinstance(schema["type"], str):
        return "a list of types beside other keywords"
    fits = all(isinstance(value, kinds) for value in values)
    if bool not in kinds and any(isinstance(value, bool) for value in values):
        fits = False
    return None if fits and form <= {"enum", "const"} else f"all of {sorted(keywords)} together"


def _why_type_open(schema: dict[str, Any], keywords: set[str]) -> str | None:
    kind = schema.get("type")
    if isinstance(kind, list):
        if keywords == {"type"} and all(item in _VALUES for item in kind):
            return None
        return "a list of types beside other keywords"
    if not isinstance(kind, str) or kind not in KEYWORDS_BY_TYPE:
        return "a schema without a type"
    unknown = keywords - {"type"} - KEYWORDS_BY_TYPE[kind]
    if unknown:
        return f"the keyword {min(unknown)!r} of {kind}"
    if kind == "object":
        properties = schema.get("properties")
        if not properties or not set(schema.get("required", ())) <= set(properties):
            return "an object whose members are not all among its properties"
        if any(json.dumps(name, ensure_ascii=False) != f'"{name}"' for name in properties):
            return "the name of a property that JSON escapes"  # it does not
        if schema.get("additionalProperties", True) not in (True, False):
            return "a schema of additionalProperties"
        return next((r for item in properties.values() if (r := _why_open(item)) is not None), None)
    if kind == "array":
        return _why_open(schema["items"]) if "items" in schema else "an array of anything"
    return None
