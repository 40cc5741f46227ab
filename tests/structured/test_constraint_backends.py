"""Every library keeps the same contract, and refuses what it would not enforce."""

from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest

from quire.errors import InvalidRequestError
from quire.structured.backends import load_constraint_backend
from quire.structured.closed_schema import why_open
from quire.structured_outputs import StructuredOutputsParams

LIBRARIES = ("llguidance", "outlines_core", "xgrammar")
CONSTRAINTS = [
    {"regex": "(ab|[c-e]{2})+x?"},
    {"regex": r"hello world, this is (\d{2}|é€😀)"},
    {"choice": ["the quick fox", "the quick dog", "the", "o.(*", 'é\n"', "\x7fa"]},
    {
        "json": {
            "type": "object",
            "properties": {"hello": {"enum": [1, "x"]}},
            "required": ["hello"],
        }
    },
]


@pytest.fixture(scope="module", params=LIBRARIES)
def backend(request, vocabulary):
    pytest.importorskip(request.param)
    return load_constraint_backend(request.param, vocabulary, 10.0)


def spec(**constraint):
    return StructuredOutputsParams(**constraint).spec


def allowed(constraint, vocabulary):
    row = np.full(vocabulary.num_words, -1, dtype=np.int32)
    constraint.fill_mask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: vocabulary.end_id]).tolist()


@pytest.mark.parametrize("wanted", CONSTRAINTS, ids=str)
def test_a_constraint_is_where_its_tokens_lead_however_it_came_there(backend, vocabulary, wanted):
    """Rolled back and copied ones allow what one does that was led there straight."""
    rng = random.Random(0)
    compiled = backend.compile(spec(**wanted))
    for _ in range(20):
        walker, tokens = compiled.start(), []
        while len(tokens) < 12 and (choices := allowed(walker, vocabulary)):
            assert all(vocabulary.tokens[i] for i in choices), "a token without text"
            tokens.append(rng.choice(choices))
            before = walker.copy()
            walker.accept(tokens[-1:])
            count = rng.randint(0, len(tokens))
            walker.rollback(count)
            straight = compiled.start()
            straight.accept(tokens[: len(tokens) - count])
            assert allowed(walker, vocabulary) == allowed(straight, vocabulary)
            assert walker.is_accepting() == straight.is_accepting()
            walker.accept(tokens[len(tokens) - count :])
            before.accept(tokens[-1:])
            assert allowed(before, vocabulary) == allowed(walker, vocabulary)
            assert before.is_finished() == walker.is_finished()
        assert walker.is_finished() == (walker.is_accepting() and not allowed(walker, vocabulary))


@pytest.mark.parametrize("wanted", CONSTRAINTS, ids=str)
def test_forced_tokens_are_the_only_text_that_may_follow(backend, vocabulary, wanted):
    """Whatever else is allowed begins with it, or is its beginning."""
    rng = random.Random(1)
    found = 0
    compiled = backend.compile(spec(**wanted))
    for _ in range(10):
        walker = compiled.start()
        while choices := allowed(walker, vocabulary):
            forced = walker.forced_tokens()
            text = b"".join(vocabulary.tokens[i] for i in forced)
            if text:
                found += 1
                for i in choices:
                    token = vocabulary.tokens[i]
                    assert text.startswith(token) or token.startswith(text)
                ahead = walker.copy()
                ahead.accept(forced)
            walker.accept([rng.choice(choices)])
            if walker.is_accepting():
                break
    assert found or "hello" not in str(wanted)


RARE = [
    *(r"\x41b", r"[\x41bc]{2}", r"\u0041b", r"\U0001F600a", r"\0a", r"\012", r"[\012]", r"[\b]a"),
    *("a$b", "a^b", "(^a|b$)", "a$|^b", r"(\Aa)b", r"a\Zb", "[^]a]b", "[]a]{2}", "[^^]", "[$^]{2}"),
    *(r"\s{2}", r"\S", r"[\S]", r"[^\s]", r"\W", r"[^\w]", "a.b", r"[^\]]a", r"\Q", r"\e"),
    *(r"[\a\f\v]{2}", r"\a", r"\.\*\$\^", "a{,2}b", r"\ud83d", r"\N{DIGIT ONE}"),
]


def test_what_matches_a_regex_of_rare_parts_does_so_in_python(backend, vocabulary):
    """Such parts are read as Python does, or refused."""
    rng = random.Random(2)
    num_texts = 0
    for pattern in RARE:
        try:
            compiled = backend.compile(spec(regex=pattern))
        except InvalidRequestError:
            continue
        for _ in range(60):
            walker, text = compiled.start(), b""
            while (choices := allowed(walker, vocabulary)) and len(text) < 30:
                token = rng.choice(choices)
                walker.accept([token])
                text += vocabulary.tokens[token]
            if walker.is_accepting():
                num_texts += 1
                assert re.fullmatch(pattern, text.decode()), (pattern, text)
    assert num_texts > 500


def test_a_choice_is_spelled_as_it_is(backend, vocabulary):
    """Also where a letter stands behind an escape that might take it for one of its digits."""
    for text in ("\x7fa", "\x000", "\x1bcd", "\\x41"):
        compiled = backend.compile(spec(choice=[text]))
        walker, found = compiled.start(), b""
        while choices := allowed(walker, vocabulary):
            walker.accept(choices[:1])
            found += vocabulary.tokens[choices[0]]
        assert (found.decode(), walker.is_accepting()) == (text, True)


@pytest.mark.parametrize(
    "wanted", [{"grammar": "start: start"}, {"json": {"$ref": "#"}}, {"regex": r"[^\s\S]"}]
)
def test_what_no_text_matches_is_refused(vocabulary, wanted):
    """When it is compiled, and not by a request that is stuck at its first token."""
    with pytest.raises(InvalidRequestError, match="no text matches it"):
        load_constraint_backend("llguidance", vocabulary, 10.0).compile(spec(**wanted))


def test_a_token_that_may_not_follow_is_refused(backend, vocabulary):
    walker = backend.compile(spec(regex="ab")).start()
    wrong = vocabulary.tokens.index(b"b")
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        walker.accept([wrong])


def test_what_it_cannot_enforce_is_refused_with_its_name(backend):
    for wanted in (
        {"regex": "a(b"},
        {"regex": r"(a)\1"},
        {"regex": "(?=a)b"},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json": {"type": "nonsense"}},
    ):
        with pytest.raises(InvalidRequestError, match=r"cannot be enforced by \w+: "):
            backend.compile(spec(**wanted))


def test_an_explosive_automaton_is_given_up_at_the_deadline(vocabulary):
    """The process that made it is ended, and later ones are compiled."""
    pytest.importorskip("outlines_core")
    backend = load_constraint_backend("outlines_core", vocabulary, 1.0)
    started = time.monotonic()
    with pytest.raises(InvalidRequestError, match="regex cannot be enforced by outlines_core"):
        backend.compile(spec(regex=r"(\w{1,100}-?){1,100}"))
    assert time.monotonic() - started < 5.0
    assert backend.compile(spec(regex="a")).start().forced_tokens()


OPEN = [
    True,
    {},
    {"type": "object"},
    {"type": "integer", "minimum": 3},
    {"type": "string", "pattern": "a"},
    {"type": "string", "format": "date"},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "array"},
    {"type": "array", "items": {"type": "integer", "maximum": 3}},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"type": "null"}}, "minProperties": 1},
    {"type": "object", "properties": {'a"': {"type": "null"}}},
    {"type": "object", "properties": {"a": {}}},
    {"type": "integer", "enum": ["a"]},
    {"type": "integer", "enum": [True]},
    {"enum": [[1]]},
    {"anyOf": [{"type": "null"}, {"type": "string", "format": "uri"}]},
    {"anyOf": [{"type": "null"}], "type": "null"},
    {"allOf": [{"type": "null"}]},
    {"oneOf": [{"type": "null"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}},
    {"$ref": "#/$defs/a", "type": "null"},
    {"$ref": "https://example.com/schema.json"},
]
CLOSED = [
    {"type": "string", "maxLength": 3, "title": "a name"},
    {"type": ["string", "null"]},
    {"type": "string", "enum": ["a", "b"]},
    {"enum": [1, "a", None, True, 1.5]},
    {"const": "a"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
]


def test_a_schema_of_which_a_regex_would_drop_a_keyword_is_known() -> None:
    for schema in OPEN:
        assert why_open(schema) is not None, schema
    for schema in CLOSED:
        assert why_open(schema) is None, schema
