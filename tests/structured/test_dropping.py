"""Keywords that a library cannot enforce go only where that is asked for, and are checked then."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import (
    InvalidRequestError,
    RequestFailedError,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.structured.subschemas import subschemas, without
from quire.structured.validator import InvalidTextError, Validator

PROMPT = {"prompt_token_ids": [1, 40, 41, 42]}
BACKENDS = ("llguidance", "outlines_core", "xgrammar")
PLAIN = SamplingParams(temperature=1.5, seed=5, max_tokens=30, ignore_eos=True)
COIN = {"enum": [0, 1]}
PAIR = {"type": "array", "items": COIN, "minItems": 2, "maxItems": 2, "uniqueItems": True}
OBJECT = {
    "type": "object",
    "properties": {"not": COIN, "uniqueItems": COIN, "format": PAIR},
    "required": ["not", "uniqueItems", "format"],
    "additionalProperties": False,
}


def params(schema, backend="llguidance", drop=True, **options):
    constraint = StructuredOutputsParams(
        json=schema, backend=backend, disable_any_whitespace=True, drop_unsupported=drop
    )
    options = {"temperature": 100.0, "max_tokens": 60, **options}
    return SamplingParams(structured_outputs=constraint, **options)


def collect(llm, many):
    """Run requests together; return of each its last output, or what ended it."""
    loop, done = llm.engine_loop, threading.Event()
    results: dict[int, object] = {}

    def sink_for(i):
        def sink(news):
            if isinstance(news, BaseException) or news.finished:
                results[i] = news
                if len(results) == len(many):
                    done.set()

        return sink

    process = loop.engine.processor.process
    loop.submit(
        [
            (process(PROMPT, each, request_id=f"{id(many)}-{i}"), sink_for(i))
            for i, each in enumerate(many)
        ]
    )
    assert done.wait(30)
    return [results[i] for i in range(len(many))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize("schema", [PAIR, OBJECT], ids=["array", "object"])
def test_a_text_is_valid_by_the_whole_schema_or_its_request_fails_alone(llm, backend, schema):
    """Names of properties that are called like keywords stay."""
    [alone] = collect(llm, [PLAIN])
    *results, other = collect(llm, [*(params(schema, backend, seed=i) for i in range(20)), PLAIN])
    failed = [each for each in results if isinstance(each, RequestFailedError)]
    passed = [each.outputs[0] for each in results if not isinstance(each, RequestFailedError)]
    assert failed, "of twenty pairs of coins, some are equal"
    assert passed, failed[0]
    for error in failed:
        assert "does not hold to 'uniqueItems'" in str(error)
        assert "[0,0]" in str(error) or "[1,1]" in str(error)
    for completion in passed:
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), schema)
    assert other.outputs[0].token_ids == alone.outputs[0].token_ids
    refused = collect(llm, [params(schema, backend, drop=False)])[0]
    assert "cannot be enforced" in str(refused)


def test_what_is_enforced_in_full_is_the_same_with_and_without(llm, backend, caplog):
    """Nothing is dropped, nothing said, and no other token drawn."""
    schema = {"type": "object", "properties": {"a": COIN, "b": {"type": "boolean"}}}
    schemas = [schema, COIN, {"type": "array", "items": schema, "maxItems": 2}]
    many = [params(each, backend, drop, seed=7) for drop in (True, False) for each in schemas]
    texts = [each.outputs[0].token_ids for each in collect(llm, many)]
    assert texts[:3] == texts[3:]
    assert not caplog.records


def test_what_was_dropped_is_said_once(llm, caplog):
    schema = {**PAIR, "title": "said once"}
    with caplog.at_level(logging.WARNING):
        collect(llm, [params(schema, seed=i) for i in range(4)])
        collect(llm, [params(schema, seed=i) for i in range(4)])
    [record] = caplog.records
    assert record.getMessage() == (
        "a JSON schema is enforced by llguidance without uniqueItems: finished texts are validated"
    )


def test_one_sample_that_is_not_valid_fails_its_request(llm):
    """However it is told; and it is said which of them it was."""
    kinds = (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
    for options in ({"output_kind": kind} for kind in kinds):
        [error] = collect(llm, [params(PAIR, n=16, seed=1, **options)])
        assert isinstance(error, RequestFailedError)
        assert "sample " in str(error)
    beams = params(PAIR, n=4, use_beam_search=True, temperature=0)
    assert "uniqueItems" in str(collect(llm, [beams])[0])


def test_a_text_that_is_cut_is_not_validated(llm):
    cut, stopped = collect(llm, [params(PAIR, max_tokens=2), params(PAIR, stop=",")])
    assert cut.outputs[0].finish_reason == "length"
    assert stopped.outputs[0].stop_reason == ","


def test_one_of_several_is_enforced_as_any_of_them(llm, backend):
    """Only where the library cannot tell them apart."""
    schema = {"oneOf": [{"enum": [0, 1]}, {"enum": [1, 2]}]}
    for each in collect(llm, [params(schema, backend, seed=i) for i in range(12)]):
        if isinstance(each, RequestFailedError):
            assert "'oneOf'" in str(each)
            assert each.__cause__ is not None
        else:
            assert each.outputs[0].text in ("0", "2")


def test_what_cannot_be_dropped_or_validated_is_refused(llm):
    look = {**PAIR, "items": {"type": "string", "pattern": "(?=a)b"}}
    unbounded = {"type": "object", "patternProperties": {"(a+)+$": {"not": {}}}, "not": {}}
    elsewhere = {"allOf": [{"$ref": "https://example.com/schema.json"}], "not": {}}
    broken = {"type": "nonsense", "uniqueItems": True}
    for schema in (look, unbounded, elsewhere, broken):
        [error] = collect(llm, [params(schema)])
        assert isinstance(error, RequestFailedError)
        assert "drop_unsupported=True" in str(error)


@pytest.mark.parametrize(
    "wrong",
    [{"$schema": 5}, {"$schema": []}, {"$defs": []}, {"anyOf": 5}, {"enum": 5}, {"type": [[]]}],
)
def test_what_is_no_schema_is_refused_as_such(llm, backend, wrong):
    """Not by what Python says of the code that reads it."""
    schema = {"type": "boolean", "not": {"const": True}, **wrong}
    wanted = StructuredOutputsParams(json=schema, backend=backend, drop_unsupported=True)
    with pytest.raises(RequestFailedError, match="json cannot be enforced"):
        llm.generate(PROMPT, SamplingParams(structured_outputs=wanted), use_tqdm=False)


def test_it_is_about_json_and_needs_a_library(llm, monkeypatch):
    with pytest.raises(InvalidRequestError, match="drop_unsupported must be False without json"):
        StructuredOutputsParams(regex="a", drop_unsupported=True)
    with pytest.raises(InvalidRequestError, match="drop_unsupported"):
        StructuredOutputsParams(json={}, drop_unsupported=1)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(InvalidRequestError, match="pip install 'jsonschema"):
        llm.generate([PROMPT], params(PAIR), use_tqdm=False)


# -- the validator ---------------------------------------------------------------------------------


class Letters:
    """A vocabulary of single bytes."""

    def __init__(self):
        self.tokens = [bytes([i]) for i in range(256)]


def is_valid(schema, value):
    try:
        Validator(schema, ["not"], Letters()).check(json.dumps(value).encode())
    except InvalidTextError:
        return False
    return True


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([0.0, 1.0, 0.5])
    | st.text("ab\n\x1f"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = st.sampled_from(
    [
        PAIR,
        {"uniqueItems": True},
        {"not": {"type": "array", "uniqueItems": True}},
        {"pattern": "a"},
        {"pattern": "^(a|b)+$"},
        {"items": {"pattern": "ab?\\n?"}, "contains": {"type": "integer"}},
        {"oneOf": [{"type": "integer"}, {"minimum": 1}]},
        {"propertyNames": {"pattern": "^a"}, "additionalProperties": {"$ref": "#"}},
        {"if": {"type": "string"}, "then": {"format": "date"}, "else": {"enum": [1, [], {}]}},
        False,
    ]
)


@given(schema=SCHEMAS, value=VALUES)
def test_texts_are_valid_as_jsonschema_has_it(schema, value):
    """But for what is written there to bound the time."""
    reference = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    assert is_valid(schema, value) == reference.is_valid(value)


def test_no_text_and_no_schema_keep_the_engine_waiting():
    """References that double, patterns that backtrack, many items, and a loop."""
    doubled = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    slow = [
        ({"$ref": "#/$defs/a0", "$defs": {**doubled, "a60": False}}, 1),
        ({"pattern": "^(a+)+$"}, "a" * 5000 + "b"),
        ({"uniqueItems": True}, [[i] for i in range(20_000)] + [[0]]),
        ({"$ref": "#"}, 1),
        ({"items": {"enum": list(range(20_000))}}, [-1] * 20_000),
    ]
    for schema, value in slow:
        validator = Validator(schema, ["not"], Letters())
        started = time.monotonic()
        with pytest.raises(InvalidTextError):
            validator.check(json.dumps(value).encode())
        assert time.monotonic() - started < 20.0


@pytest.mark.parametrize("inner", [{"$ref": "#/hidden"}, {"allOf": [{"$ref": "#/hidden"}]}])
@pytest.mark.parametrize("other", [{}, {"additionalProperties": False}])
def test_patterns_that_only_a_reference_leads_to_are_not_tried(inner, other):
    """Where no schema stands by its place, there may be one: Python's re would run for hours."""
    hidden = {**other, "patternProperties": {"^(a+)+$": False}}
    validator = Validator({"not": inner, "hidden": hidden}, ["not"], Letters())
    started = time.monotonic()
    with pytest.raises(InvalidTextError, match="nothing bounds 'patternProperties'"):
        validator.check(json.dumps({"a" * 25 + "b": 1}).encode())
    assert time.monotonic() - started < 10.0


def test_only_schemas_are_rewritten():
    """Not names of properties, nor values, wherever they look like keywords."""
    data = {"not": {"not": 1}, "uniqueItems": True}
    schema = {
        "properties": {"not": {"not": {}}, "items": {"const": data, "not": {}}},
        "$defs": {"not": {"default": data, "items": [{"not": {}}, {"enum": [data]}]}},
        "examples": [data],
        "anyOf": [{"not": {}}, True, {"additionalProperties": {"not": {}}}],
        "x-own": data,
    }
    kept, dropped = without(schema, lambda s: {k: v for k, v in s.items() if k != "not"})
    assert dropped == ["not"]
    assert kept == {
        "properties": {"not": {}, "items": {"const": data}},
        "$defs": {"not": {"default": data, "items": [{}, {"enum": [data]}]}},
        "examples": [data],
        "anyOf": [{}, True, {"additionalProperties": {}}],
        "x-own": data,
    }
    assert {"not": 1} not in subschemas(schema)
