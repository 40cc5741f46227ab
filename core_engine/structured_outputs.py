"""StructuredOutputsParams: what the text of a completion has to match."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from quire.errors import InvalidRequestError
from quire.utils.checks import flag, refuse
from quire.utils.keywords import refuse_unknown_keywords

BACKENDS: Final = ("llguidance", "outlines_core", "xgrammar")
"""The libraries that can enforce a constraint, by the names that ``backend`` takes."""

KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""The fields of which one says what the text has to match."""

_LONGEST: Final = 1_000_000
"""Most characters of a constraint: what is larger takes minutes and gigabytes to compile."""

_DEEPEST: Final = 100
"""Most levels of a constraint: the compilers are recursive, and some end the process too deep."""

_LARK: Final = re.compile(r"(?m)^[ \t]*(?:%llguidance\b|[?!_]*start\b[^:\n\"]*:(?!:=))")

_LARK_TOKENS: Final = re.compile(
    r"""//[^\n]*|\#[^\n]*|"(?:\\.|[^"\\])*"|(?P<regex>/(?:\\.|[^/\\\n])+/)|(?P<bracket>[()\[\]{}])"""
)
_GBNF_TOKENS: Final = re.compile(
    r"""\#[^\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|(?P<regex>(?!))|(?P<bracket>[()])"""
)


class ConstraintSpec(NamedTuple):
    """A constraint in a form that is compared and hashed by what it says.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    text : str
        JSON for ``json``, ``choice`` and ``structural_tag``; else as it was written.
    whitespace_pattern : str or None
    any_whitespace : bool
        Whether whitespace may stand between the parts of JSON.
    drop_unsupported : bool
        Whether what a library cannot enforce of a schema is left to a validation at the end.
    """

    kind: str
    text: str
    whitespace_pattern: str | None
    any_whitespace: bool
    drop_unsupported: bool = False


@refuse_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text of a completion has to match; exactly one of the first six says it.

    Parameters
    ----------
    json : dict, str or pydantic model class, optional
        A JSON schema, as a dict or as JSON. A model class stands for its schema.
    regex : str, optional
        A regular expression that the whole text matches, as with ``re.fullmatch``. No
        look-around and no back-references, which no automaton has.
    choice : list of str, optional
        The texts of which it has to be one.
    grammar : str, optional
        A grammar in Lark's notation, with a rule ``start``, or in GBNF (EBNF), with ``root``.
    json_object : bool, optional
        True for any JSON object.
    structural_tag : dict or str, optional
        Free text in which what a tag begins is constrained until it ends:
        ``{"structures": [{"begin": str, "schema": dict, "end": str}], "triggers": [str]}``. Each
        ``begin`` starts with one of the triggers, which stand nowhere else in the text. With
        ``"at_least_one": True`` the text cannot end before a tag, with ``"stop_after_first": True``
        it ends after the first: together they let a model think freely up to a marker such as
        ``</think>``, and constrain what follows.
    whitespace_pattern : str, optional
        A regex of what may stand between the parts of JSON; any whitespace if left out.
    disable_any_whitespace : bool, default False
        Write JSON without whitespace between its parts.
    canonical_tokens : bool, default False
        Write text that must follow in the tokenizer's own tokens, without asking the model. That
        is faster, and another distribution: the model would at times write the same text in other
        tokens, and go on otherwise after them. Penalties, biases and processors have no say in
        such tokens, and no log-probabilities can be asked for.
    drop_unsupported : bool, default False
        Keywords of a JSON schema that the backend cannot enforce do not fail the request: the
        grammar goes without them, a warning is logged that names them, and each finished text is
        validated by all of the schema. One that is not valid fails the request, with an error
        that says where and quotes the text. Needs the package jsonschema.
    backend : {"llguidance", "outlines_core", "xgrammar"}, optional
        What enforces it; None for the engine's ``structured_outputs_backend``.

    Raises
    ------
    InvalidRequestError
        None of the first six, or more than one; a value that is no such thing, is too long
        (1,000,000 characters) or nested too deep (100 levels).
    TypeError
        An unknown keyword; the message names the nearest valid one.

    Attributes
    ----------
    spec : ConstraintSpec
    """

    json: str | dict[str, Any] | type | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    canonical_tokens: bool = False
    drop_unsupported: bool = False
    backend: str | None = None
    spec: ConstraintSpec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.json_object is not None and not flag("json_object", self.json_object):
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise InvalidRequestError(
                f"structured_outputs must have exactly one of {', '.join(KINDS)}, got {got}"
            )
        [kind] = given
        text = _READERS[kind](self, kind, getattr(self, kind))
        if len(text) > _LONGEST:
            raise InvalidRequestError(
                f"{kind} must have at most {_LONGEST} characters, got {len(text)}"
            )
        flag("disable_any_whitespace", self.disable_any_whitespace)
        flag("canonical_tokens", self.canonical_tokens)
        if flag("drop_unsupported", self.drop_unsupported) and kind != "json":
            raise refuse("drop_unsupported", True, "False without json, whose keywords it is about")
        if self.whitespace_pattern is not None:
            if kind not in ("json", "json_object"):
                expected = "None without json or json_object, whose whitespace it describes"
                raise refuse("whitespace_pattern", self.whitespace_pattern, expected)
            if self.disable_any_whitespace:
                expected = "None with disable_any_whitespace, which allows none"
                raise refuse("whitespace_pattern", self.whitespace_pattern, expected)
            _read_regex(self, "whitespace_pattern", self.whitespace_pattern)
        if self.backend is not None and self.backend not in BACKENDS:
            expected = f"one of {', '.join(map(repr, BACKENDS))}, or None"
            raise refuse("backend", self.backend, expected)
        spec = ConstraintSpec(
            kind,
            text,
            self.whitespace_pattern,
            not self.disable_any_whitespace,
            self.drop_unsupported,
        )
        object.__setattr__(self, "spec", spec)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def is_lark(grammar: str) -> bool:
    """Return whether a grammar is in Lark's notation, which has a rule ``start``, or in GBNF."""
    return _LARK.search(grammar) is not None


# -- readers: each returns the text that stands for a value, or refuses it -----------------------


def _read_json(params: StructuredOutputsParams, name: str, value: Any) -> str:
    expected = "a JSON schema, as a dict or as JSON text, or a pydantic model class"
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        try:
            value = value.model_json_schema()
        except Exception as error:
            raise InvalidRequestError(
                f"{name} must be {expected}, got {value.__name__}, of which pydantic makes no "
                f"schema: {error}"
            ) from error
        params._keep(name, value)
    return _json_text(name, value, expected)


def _read_tag(params: StructuredOutputsParams, name: str, value: Any) -> str:
    text = _json_text(name, value, "a dict of structures and triggers, or such JSON")
    tag = json.loads(text)
    _check_tag(name, tag)
    return text


def _json_text(name: str, value: Any, expected: str) -> str:
    """Return a value, or the JSON that it is, as JSON in a form that is equal for equal values."""
    if isinstance(value, str):
        if len(value) > _LONGEST:
            raise InvalidRequestError(
                f"{name} must have at most {_LONGEST} characters, got {len(value)}"
            )
        _check_depth(name, _bracket_depth(value))
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidRequestError(
                f"{name} must be {expected}; it is no JSON: {error}"
            ) from None
    elif not isinstance(value, Mapping):
        raise refuse(name, value, expected)
    else:
        _check_depth(name, _value_depth(value))
    if not isinstance(value, (Mapping, bool)):
        raise refuse(name, value, expected)
    try:
        # The order of keys is kept: it is the order in which they are generated.
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} must be {expected}; it is no JSON: {error}") from None
    return text


def _read_regex(params: StructuredOutputsParams, name: str, value: Any) -> str:
    text = _plain_text(name, value, "a regular expression", blank=name == "whitespace_pattern")
    _check_depth(name, _regex_depth(text))
    return text


def _read_grammar(params: StructuredOutputsParams, name: str, value: Any) -> str:
    text = _plain_text(name, value, "a grammar in Lark or GBNF notation")
    _check_depth(name, _grammar_depth(text))
    return text


def _read_choice(params: StructuredOutputsParams, name: str, value: Any) -> str:
    expected = "a list of at least one string"
    if isinstance(value, (str, bytes, Mapping)):
        raise refuse(name, value, expected)
    try:
        items = list(value)
    except TypeError:
        raise refuse(name, value, expected) from None
    if not items or not all(isinstance(item, str) for item in items):
        raise refuse(name, value, expected)
    if items == [""]:
        raise refuse(name, value, "a list with at least one string that is not empty")
    for item in items:
        _encodable(name, item)
    params._keep(name, items)
    return json.dumps(list(dict.fromkeys(items)), ensure_ascii=False)


def _read_object(params: StructuredOutputsParams, name: str, value: Any) -> str:
    return '{"type": "object"}'


_READERS: Final = {
    "json": _read_json,
    "regex": _read_regex,
    "choice": _read_choice,
    "grammar": _read_grammar,
    "json_object": _read_object,
    "structural_tag": _read_tag,
}


def _plain_text(name: str, value: Any, expected: str, *, blank: bool = False) -> str:
    if not isinstance(value, str) or not (value if blank else value.strip()):
        raise refuse(name, value, f"{expected}, as a string that is not empty")
    if len(value) > _LONGEST:
        raise InvalidRequestError(
            f"{name} must have at most {_LONGEST} characters, got {len(value)}"
        )
    _encodable(name, value)
    return value


def _encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} holds a lone surrogate, {text[error.start]!r}, which is no character"
        ) from None


_TAG_FLAGS: Final = ("at_least_one", "stop_after_first")


def _check_tag(name: str, tag: Any) -> None:
    fields = tag if isinstance(tag, dict) else {}
    structures, triggers = fields.get("structures"), fields.get("triggers")
    if set(fields) - {"type", *_TAG_FLAGS} != {"structures", "triggers"} or not (
        isinstance(structures, list)
        and structures
        and isinstance(triggers, list)
        and triggers
        and all(isinstance(trigger, str) and trigger for trigger in triggers)
    ):
        expected = (
            "a dict of structures and triggers, none of them empty, and perhaps of "
            f"{' and '.join(_TAG_FLAGS)}"
        )
        raise refuse(name, tag, expected)
    for field_name in _TAG_FLAGS:
        flag(f"{field_name} of {name}", fields.get(field_name, False))
    for item in structures:
        if (
            not isinstance(item, dict)
            or set(item) != {"begin", "schema", "end"}
            or not isinstance(item["begin"], str)
            or not isinstance(item["end"], str)
            or not isinstance(item["schema"], (dict, bool))
        ):
            expected = "a dict of begin (a string), schema (a JSON schema) and end (a string)"
            raise refuse(f"each of the structures of {name}", item, expected)
        if not any(item["begin"].startswith(trigger) for trigger in triggers):
            expected = f"a string that starts with one of the triggers {triggers}"
            raise refuse(f"begin of each of the structures of {name}", item["begin"], expected)


# -- depths ---------------------------------------------------------------------------------------


def _check_depth(name: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise InvalidRequestError(
            f"{name} must be nested at most {_DEEPEST} levels deep, and it is nested deeper"
        )


def _value_depth(value: Any) -> int:
    """Return how deep containers are nested, or a number past the bound as soon as it is passed."""
    level: list[Any] = [value]
    for depth in range(_DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inner.extend(item)
        if not inner:
            return depth
        level = [item for item in inner if isinstance(item, (Mapping, list, tuple))]
        if len(level) > _LONGEST:  # no text of the longest length holds so many
            break
    return _DEEPEST + 1


def _bracket_depth(text: str) -> int:
    """Return how deep the brackets of JSON are nested, without reading it by recursion."""
    depth = deepest = 0
    for match in re.finditer(r'"(?:\\.|[^"\\])*"|([\[{])|[\]}]', text, re.DOTALL):
        if match[0][0] != '"':
            depth += 1 if match[1] else -1
            deepest = max(deepest, depth)
    return deepest


def _regex_depth(text: str) -> int:
    """Return how deep the groups and classes of a regex are nested, or seem to be."""
    depth = deepest = 0
    for match in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        if match[0] in "([":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in ")]":
            depth = max(depth - 1, 0)
    return deepest


def _grammar_depth(text: str) -> int:
    depth = deepest = 0
    for match in (_LARK_TOKENS if is_lark(text) else _GBNF_TOKENS).finditer(text):
        if match["regex"]:
            deepest = max(deepest, _regex_depth(match["regex"]))
        elif match["bracket"]:
            depth = depth + 1 if match["bracket"] in "([{" else max(depth - 1, 0)
            deepest = max(deepest, depth)
    return deepest
