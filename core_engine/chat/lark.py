"""Pieces of grammars in Lark's notation."""

from __future__ import annotations

import json
from typing import Any, Final

_WHITESPACE: Final = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}
"""At most a space between the parts of JSON: more of it is how weak models run on."""


def lark_string(text: str) -> str:
    """Return a literal for a text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def lark_json(schema: dict[str, Any], whitespace: dict[str, Any] = _WHITESPACE) -> str:
    """Return what a rule has to have for JSON that matches a schema."""
    strict = {"lenient": False, "coerce_one_of": False, **whitespace}
    return f"%json {json.dumps({**schema, 'x-guidance': strict}, ensure_ascii=False)}"
