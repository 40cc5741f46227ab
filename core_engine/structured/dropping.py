"""Schemas without the keywords that a library cannot enforce, where a request asks for that."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.structured.closed_schema import KEYWORDS_BY_TYPE, NOTES
from quire.structured.subschemas import without
from quire.structured.validator import Validator

if TYPE_CHECKING:
    from quire.structured.constraint import CompiledConstraint, ConstraintBackend
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec

logger = logging.getLogger(__name__)

_BY_VALUE: Final = ("enum", "const", "$ref", "anyOf")
"""Of these, a schema for the libraries of regexes has one."""

_NEVER: Final = frozenset(
    (
        *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains"),
        *("propertyNames", "dependentRequired", "dependentSchemas", "dependencies"),
        *("contentEncoding", "contentMediaType", "contentSchema"),
    )
)
_SELDOM: Final = _NEVER | {"format", "minProperties", "maxProperties", "multipleOf"}


def compile_dropping(
    name: str, backend: ConstraintBackend, spec: ConstraintSpec, vocabulary: Vocabulary
) -> tuple[CompiledConstraint, Validator | None]:
    """Make a schema ready, without what the library refuses of it; as little as will do.

    Returns
    -------
    CompiledConstraint
    Validator or None
        What finished texts have to be held against; None where all of it is enforced.

    Raises
    ------
    InvalidRequestError
        The library refuses it all the same, or what was dropped could not be validated.
    """
    spec = spec._replace(drop_unsupported=False)
    try:
        return backend.compile(spec), None
    except InvalidRequestError as error:
        refusal = error
    schema = json.loads(spec.text)
    for keep in _STAGES[name]:
        kept = without(schema, keep)
        if not kept.dropped:
            continue
        try:
            text = json.dumps(kept.schema, ensure_ascii=False)
            compiled = backend.compile(spec._replace(text=text))
        except InvalidRequestError as error:
            refusal = error
            continue
        validator = Validator(schema, kept.dropped, vocabulary)
        logger.warning(
            "a JSON schema is enforced by %s without %s: finished texts are validated",
            name,
            ", ".join(kept.dropped),
        )
        return compiled, validator
    raise InvalidRequestError(f"{refusal} (also with drop_unsupported=True)")


# -- what is kept, stage by stage ------------------------------------------------------------------


def _but(words: frozenset[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def keep(schema: dict[str, Any]) -> dict[str, Any]:
        return {word: value for word, value in schema.items() if word not in words}

    return keep


def _one_of_as_any_of(
    keep: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def keep_any(schema: dict[str, Any]) -> dict[str, Any]:
        weaker = {word: value for word, value in schema.items() if word != "oneOf"}
        if "oneOf" in schema:
            weaker.setdefault("anyOf", schema["oneOf"])
        return keep(weaker)

    return keep_any


def _closed(words: frozenset[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keep what :func:`~quire.structured.closed_schema.why_open` allows, without some of it."""

    def keep(schema: dict[str, Any]) -> dict[str, Any]:
        found = next((word for word in _BY_VALUE if word in schema), None)
        if found is not None:
            allowed = NOTES | {found}
        else:
            kind = schema.get("type")
            own = KEYWORDS_BY_TYPE.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
            allowed = NOTES | own | {"type"}
        kept = {word: value for word, value in schema.items() if word in allowed - words}
        if isinstance(kept.get("additionalProperties"), dict):
            del kept["additionalProperties"]
        return kept

    return keep


_STAGES: Final[dict[str, list[Callable[[dict[str, Any]], dict[str, Any]]]]] = {
    "llguidance": [
        _but(_NEVER),
        _one_of_as_any_of(_but(_NEVER)),
        _but(_SELDOM),
        _one_of_as_any_of(_but(_SELDOM)),
    ],
    "outlines_core": [_one_of_as_any_of(_closed(frozenset()))],
    "xgrammar": [_one_of_as_any_of(_closed(frozenset(("minLength", "maxLength"))))],
}
