"""Outlines' output types as constraints of the engine."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any, Final, is_typeddict

from quire.errors import InvalidRequestError
from quire.integrations.outlines.schemas import closed
from quire.integrations.outlines.upstream import (
    CFG,
    Alternatives,
    Choice,
    JsonSchema,
    KleenePlus,
    KleeneStar,
    Optional,
    QuantifyBetween,
    QuantifyExact,
    QuantifyMaximum,
    QuantifyMinimum,
    Regex,
    Sequence,
    String,
    Term,
    python_types_to_terms,
    to_regex,
)
from quire.structured.regex import UntranslatableError, to_rust
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import shown

_WHITESPACE: Final = "[ ]?"
"""What Outlines' manual says may stand between the parts of JSON, unless a schema says else."""


def structured_outputs_for(
    output_type: Any, *, backend: str | None = None
) -> StructuredOutputsParams | None:
    """Return the constraint that an output type of Outlines stands for.

    Parameters
    ----------
    output_type : type, Term, callable, StructuredOutputsParams or None
        Whatever Outlines takes for one, or a constraint of the engine.
    backend : {"llguidance", "outlines_core", "xgrammar"}, optional
        What enforces it; None for the engine's.

    Returns
    -------
    StructuredOutputsParams or None
        None for None: any text.

    Raises
    ------
    TypeError
        What is no output type, or one that Outlines has no term for.
    InvalidRequestError
        A type of which no schema can be made, an empty choice, and all else that
        :class:`quire.StructuredOutputsParams` refuses.
    """
    if output_type is None:
        return None
    if isinstance(output_type, StructuredOutputsParams):
        return replace(output_type, backend=output_type.backend or backend)
    if output_type is dict:
        return StructuredOutputsParams(json_object=True, **_spaces(None, backend))
    term = _term(output_type)
    if isinstance(term, CFG):
        return StructuredOutputsParams(grammar=term.definition, backend=backend)
    if isinstance(term, JsonSchema):
        return StructuredOutputsParams(
            json=_schema(term.schema), **_spaces(term.whitespace_pattern, backend)
        )
    texts = _texts(term)
    if texts is not None:
        return StructuredOutputsParams(choice=texts, backend=backend)
    if _has(term, CFG):
        raise TypeError(
            f"output type {shown(output_type)}: a grammar, which dict is one of inside of another "
            "type, stands for a whole text only; name the members' types, as in dict[str, int]"
        )
    if _has(term, JsonSchema):
        return StructuredOutputsParams(grammar=_Lark().grammar(term), backend=backend)
    # As it was written: in the group that to_regex makes, anchors and flags mean something else.
    regex = term.pattern if isinstance(term, Regex) else to_regex(term)
    return StructuredOutputsParams(regex=regex, backend=backend)


def _term(output_type: Any) -> Term:
    """Return what Outlines makes of an output type."""
    if isinstance(output_type, dict):
        raise TypeError(
            f"output type {shown(output_type)} is a dict: write outlines.types.JsonSchema(...) "
            "for a JSON schema"
        )
    try:
        return python_types_to_terms(output_type)
    except TypeError as error:
        hint = ""
        if is_typeddict(output_type):
            hint = "; before Python 3.12 it takes the TypedDict of typing_extensions"
        raise TypeError(
            f"output type {shown(output_type)} is none that Outlines takes: {error}{hint}"
        ) from error
    except Exception as error:  # pydantic's, jsonschema's and Outlines' own, of many kinds
        raise InvalidRequestError(
            f"output type {shown(output_type)} stands for no schema: {error}"
        ) from error


def _schema(text: str) -> dict[str, Any]:
    schema = json.loads(text)
    if isinstance(schema, dict):
        return closed(schema)
    return {} if schema else {"not": {}}  # true or false


def _spaces(pattern: str | None, backend: str | None) -> dict[str, Any]:
    """Return what may stand between the parts of JSON, and the backend, as arguments."""
    if pattern is None:
        # xgrammar takes no pattern.
        pattern = "" if backend == "xgrammar" else _WHITESPACE
    return {
        "whitespace_pattern": pattern or None,
        "disable_any_whitespace": not pattern,
        "backend": backend,
    }


def _texts(term: Term) -> list[str] | None:
    """Return the texts that a term allows, if it is a plain choice of texts."""
    if isinstance(term, String):
        return [term.value]
    if isinstance(term, Regex):  # numbers, True and None are written so
        text = re.sub(r"\\(.)", r"\1", term.pattern, flags=re.DOTALL)
        return [text] if re.escape(text) == term.pattern else None
    if not isinstance(term, (Alternatives, Choice)):
        return None
    found: list[str] = []
    for item in _members(term):
        texts = _texts(item)
        if texts is None:
            return None
        found += texts
    return found


def _members(term: Term) -> list[Term]:
    """Return the terms that a term is made of."""
    if isinstance(term, (Alternatives, Sequence)):
        return list(term.terms)
    if isinstance(term, Choice):
        return [_term(item) for item in term.items]
    inner = getattr(term, "term", None)
    return [inner] if isinstance(inner, Term) else []


def _has(term: Term, kind: type[Term]) -> bool:
    return isinstance(term, kind) or any(_has(item, kind) for item in _members(term))


class _Lark:
    """Writes a term with JSON schemas in it as a grammar.

    Outlines writes such schemas as regexes, which hold no bounds of numbers and no recursion.
    """

    def __init__(self) -> None:
        self._rules: list[str] = []

    def grammar(self, term: Term) -> str:
        start = self._expression(term)
        return "\n".join([f"start: {start}", *self._rules, ""])

    def _expression(self, term: Term) -> str:
        if isinstance(term, JsonSchema):
            return self._json(term)
        if not _has(term, JsonSchema):
            return self._terminal(to_regex(term))
        if isinstance(term, (Alternatives, Choice)):
            return f"({' | '.join(self._expression(item) for item in _members(term))})"
        if isinstance(term, Sequence):
            parts = []
            for is_rule, items in itertools.groupby(
                term.terms, key=lambda item: _has(item, JsonSchema)
            ):
                if is_rule:
                    parts += [self._expression(item) for item in items]
                else:
                    # One terminal: those in a row would each take all that it can.
                    parts.append(self._terminal("".join(to_regex(item) for item in items)))
            return f"({' '.join(parts)})"
        return f"({self._expression(_members(term)[0])}){_repetition(term)}"

    def _terminal(self, regex: str) -> str:
        return self._rule("TEXT", f"/{_in_slashes(_rust(regex))}/")

    def _json(self, term: JsonSchema) -> str:
        schema = _schema(term.schema)
        # Its options are the engine's for any schema, whatever it says itself.
        options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
        if term.whitespace_pattern:
            options["whitespace_pattern"] = _rust(term.whitespace_pattern)
        else:
            # The parser takes optional whitespace around the whole of it, too.
            spaces = "" if term.whitespace_pattern == "" else " "
            options["whitespace_flexible"] = False
            options["key_separator"], options["item_separator"] = f":{spaces}", f",{spaces}"
        return self._rule("json", f"%json {json.dumps({**schema, 'x-guidance': options})}")

    def _rule(self, kind: str, body: str) -> str:
        name = f"{kind}_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name


def _repetition(term: Term) -> str:
    if isinstance(term, Optional):
        return "?"
    if isinstance(term, KleeneStar):
        return "*"
    if isinstance(term, KleenePlus):
        return "+"
    if isinstance(term, QuantifyExact):
        return f"{{{term.count}}}"
    if isinstance(term, QuantifyMinimum):
        return f"{{{term.min_count},}}"
    if isinstance(term, QuantifyMaximum):
        return f"{{0,{term.max_count}}}"
    if isinstance(term, QuantifyBetween):
        return f"{{{term.min_count},{term.max_count}}}"
    raise TypeError(f"{shown(term)} cannot have a JSON schema in it")


def _rust(regex: str) -> str:
    try:
        return to_rust(regex)
    except UntranslatableError as error:
        raise InvalidRequestError(f"regex {shown(regex)} cannot be enforced: {error}") from error


def _in_slashes(regex: str) -> str:
    """Return a regex as it stands between slashes, on one line."""
    special = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return "".join(special.get(token, token) for token in re.findall(r"\\.|.", regex, re.DOTALL))
