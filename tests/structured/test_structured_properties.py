"""Whatever the constraint and whatever the model: finished texts match, others can be completed.

The model has random weights and is sampled at temperature 1.5, so that it would say anything.
"""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import SamplingParams, StructuredOutputsParams
from quire.structured.backends import load_constraint_backend
from quire.structured.closed_schema import why_open
from quire.structured.regex import to_xgrammar

PROMPT = {"prompt_token_ids": [1, 40, 41, 42]}
MAX_TOKENS = 100
PLAIN = SamplingParams(temperature=1.5, seed=9, max_tokens=20, ignore_eos=True)

LITERALS = st.text(st.sampled_from('abcXYZ019 _-,"{}é€😀\n'), min_size=1, max_size=4).map(re.escape)
CLASSES = st.sampled_from(
    [r"\d", r"\w", r"\W", r"[a-f]", r"[^a-z]", ".", r"\s", r"[\w.-]", r"[é-ž]", "[&[]", r"\D"]
)


def _repeated(inner):
    counts = st.sampled_from(["?", "{2}", "{,2}", "{1,3}", "{0,1}"])
    return st.builds("(?:{}){}".format, inner, counts)


REGEXES = st.recursive(
    LITERALS | CLASSES,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?P<name{2}>{0}){1}".format, inner, inner, st.integers(0, 10**9)),
        _repeated(inner),
    ),
    max_leaves=6,
).filter(lambda pattern: _compiles(pattern))


def _compiles(pattern: str) -> bool:
    try:
        compiled = re.compile(pattern)
    except re.error:  # a name of a group that is drawn twice
        return False
    return compiled.pattern != ""


NAMES = st.text(st.sampled_from('abcé"\\ 1'), min_size=1, max_size=4)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "integer"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.integers(-(2**53), 2**53) | NAMES, min_size=1)
    ),
    st.builds(lambda value: {"const": value}, st.integers(0, 99) | NAMES | st.booleans()),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
    st.just({"type": "string", "format": "date"}),
)


def _objects(inner, names, fewest):
    def make(properties, optional, extra):
        names = sorted(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names[: max(len(names) - optional, 0)],
            "additionalProperties": extra,
        }

    return st.builds(
        make,
        st.dictionaries(names, inner, min_size=fewest, max_size=3),
        st.integers(0, 2),
        st.just(False),
    )


def _schemas(scalars, names=NAMES, fewest=0):
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            _objects(inner, names, fewest),
            st.builds(
                lambda items, least, span: {
                    "type": "array",
                    "items": items,
                    "minItems": least,
                    "maxItems": least + span,
                },
                inner,
                st.integers(0, 2),
                st.integers(0, 2),
            ),
            st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        ),
        max_leaves=5,
    )


def _params(backend, schema, space):
    return StructuredOutputsParams(json=schema, backend=backend, **space)


def regex_constraints(backend):
    patterns = REGEXES
    if backend == "xgrammar":  # it refuses the others
        patterns = REGEXES.filter(
            lambda pattern: to_xgrammar(pattern) is not None and "(?P<" not in pattern
        )
    one = patterns.map(lambda pattern: StructuredOutputsParams(regex=pattern, backend=backend))
    return st.lists(one, min_size=4, max_size=8)


def json_constraints(backend):
    schemas = _schemas(SCALARS)
    if backend != "llguidance":  # it refuses the others
        closed = SCALARS.filter(lambda schema: why_open(schema) is None)
        if backend == "xgrammar":
            closed = closed.filter(lambda schema: "maxLength" not in schema)
        schemas = _schemas(closed, names=st.text("abcé 1", min_size=1, max_size=4), fewest=1)
    spaces = [{"disable_any_whitespace": True}, {"whitespace_pattern": "[ \n]?"}]
    if backend == "xgrammar":
        spaces.pop()
    one = st.builds(_params, st.just(backend), schemas, st.sampled_from(spaces))
    return st.lists(one, min_size=4, max_size=8)


def generate(llm, constraints, seed):
    many = [
        SamplingParams(
            structured_outputs=constraint, temperature=1.5, seed=seed + i, max_tokens=MAX_TOKENS
        )
        for i, constraint in enumerate(constraints)
    ]
    *outputs, other = llm.generate([PROMPT] * (len(many) + 1), [*many, PLAIN], use_tqdm=False)
    assert other.outputs[0].token_ids == generate.plain
    return [output.outputs[0] for output in outputs]


@pytest.fixture(scope="module", autouse=True)
def _plain(llm):
    generate.plain = llm.generate([PROMPT], PLAIN, use_tqdm=False)[0].outputs[0].token_ids


def complete(vocabulary, constraint, token_ids) -> str:
    """Walk from an unfinished text through its grammar to some end; return the whole text."""
    backend = load_constraint_backend(constraint.backend, vocabulary, 30.0)
    matcher = backend.compile(constraint.spec).start()
    matcher.accept(token_ids)
    rng = random.Random(0)
    row = np.zeros(vocabulary.num_words, dtype=np.int32)
    closing = [i for i, token in enumerate(vocabulary.tokens) if token in (b'"', b"}", b"]", b",")]
    token_ids = list(token_ids)
    for _ in range(2000):
        if matcher.is_accepting():
            return b"".join(vocabulary.tokens[i] for i in token_ids).decode()
        matcher.fill_mask(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: vocabulary.end_id]).tolist()
        assert allowed, "a dead end"
        preferred = [i for i in closing if i in allowed]
        choice = rng.choice(preferred or allowed)
        matcher.accept([choice])
        token_ids.append(choice)
    raise AssertionError("no end in sight")


tally = {"finished": 0, "all": 0}


def check(llm, vocabulary, constraints, matches, seed):
    for completion, constraint in zip(generate(llm, constraints, seed), constraints, strict=True):
        tally["all"] += 1
        if completion.finish_reason == "stop":
            tally["finished"] += 1
            assert matches(constraint, completion.text), (constraint, completion.text)
        else:
            assert completion.finish_reason == "length"
            text = complete(vocabulary, constraint, completion.token_ids)
            assert matches(constraint, text), (constraint, text)


def regex_matches(constraint, text):
    return re.fullmatch(constraint.regex, text) is not None


def json_matches(constraint, text):
    import jsonschema

    validator = jsonschema.Draft202012Validator(constraint.json)
    return validator.is_valid(json.loads(text))


SEEDS = st.integers(0, 2**32)
COMMON = {"suppress_health_check": list(HealthCheck), "deadline": None}


def check_regexes(llm, vocabulary, backend, num_examples):
    @settings(max_examples=num_examples, **COMMON)
    @given(constraints=regex_constraints(backend), seed=SEEDS)
    def run(constraints, seed):
        check(llm, vocabulary, constraints, regex_matches, seed)

    run()


def check_schemas(llm, vocabulary, backend, num_examples):
    pytest.importorskip("jsonschema")

    @settings(max_examples=num_examples, **COMMON)
    @given(constraints=json_constraints(backend), seed=SEEDS)
    def run(constraints, seed):
        check(llm, vocabulary, constraints, json_matches, seed)

    run()


# Those that take longer to compile are tried less.
FEW = {"llguidance": 30, "outlines_core": 5, "xgrammar": 10}
MANY = {"llguidance": 400, "outlines_core": 100, "xgrammar": 400}


@pytest.mark.parametrize("backend", FEW)
def test_texts_match_their_regex(llm, vocabulary, backend):
    pytest.importorskip(backend)
    check_regexes(llm, vocabulary, backend, FEW[backend])


@pytest.mark.parametrize("backend", FEW)
def test_texts_are_valid_by_their_schema(llm, vocabulary, backend):
    pytest.importorskip(backend)
    check_schemas(llm, vocabulary, backend, FEW[backend])


def test_most_texts_were_finished():
    """Else the tests above would say little."""
    if tally["all"]:
        assert tally["finished"] >= 0.8 * tally["all"], tally


@pytest.mark.slow
@pytest.mark.parametrize("backend", MANY)
def test_very_many_texts_match_their_regex(llm, vocabulary, backend):
    pytest.importorskip(backend)
    check_regexes(llm, vocabulary, backend, MANY[backend])


@pytest.mark.slow
@pytest.mark.parametrize("backend", MANY)
def test_very_many_texts_are_valid_by_their_schema(llm, vocabulary, backend):
    pytest.importorskip(backend)
    check_schemas(llm, vocabulary, backend, MANY[backend])
