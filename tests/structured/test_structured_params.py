"""StructuredOutputsParams takes one constraint, checked, and says of each other why not."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import InvalidRequestError, SamplingParams, StructuredOutputsParams
from quire.structured_outputs import KINDS, is_lark

GOOD = {
    "json": {"type": "object"},
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'start: "a"',
    "json_object": True,
    "structural_tag": {
        "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}],
        "triggers": ["<"],
    },
}


def nested(depth: int) -> dict:
    """A JSON schema of arrays of arrays, without recursion here."""
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_every_kind_is_taken_alone_and_no_two_together() -> None:
    assert set(GOOD) == set(KINDS)
    for kind, value in GOOD.items():
        assert StructuredOutputsParams(**{kind: value}).spec.kind == kind
        for other in set(GOOD) - {kind}:
            with pytest.raises(InvalidRequestError, match=r"exactly one of .* got \w+ and \w+"):
                StructuredOutputsParams(**{kind: value, other: GOOD[other]})
    with pytest.raises(InvalidRequestError, match=r"exactly one of .* got none of them"):
        StructuredOutputsParams(json_object=False)


BAD = [
    *[("json", value) for value in (5, [], "nonsense", "[1]", {"a": {1, 2}}, {"a": float("nan")})],
    *[("json", value) for value in ("null", {"a": "\ud800"}, "{", int)],
    *[("regex", value) for value in (5, "", "  ", b"a", "\ud800", ["a"])],
    *[("choice", value) for value in ([], "yes", [1], ["a", None], {"a": 1}, 5, [""], ["\ud800"])],
    *[("grammar", value) for value in ("", 5, {"a": 1})],
    *[("json_object", value) for value in (1, "yes")],
    *[("structural_tag", value) for value in ({}, "true", "{}", [], {"triggers": ["<"]})],
    *[("backend", value) for value in ("vllm", 5, "")],
    *[("whitespace_pattern", value) for value in ("", 5)],
    *[("disable_any_whitespace", value) for value in (1, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_its_name(name: str, value: object) -> None:
    """The message names the field; nothing else than InvalidRequestError is raised."""
    others = {} if name in KINDS else {"json_object": True}
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(**{name: value, **others})
    assert name in str(caught.value)


def test_a_tag_must_begin_with_a_trigger() -> None:
    tag = {"structures": [{"begin": "[f]", "schema": {}, "end": ""}], "triggers": ["<"]}
    with pytest.raises(InvalidRequestError, match=r"begin of each .* starts with one of"):
        StructuredOutputsParams(structural_tag=tag)
    tag["structures"] = [{"begin": "<", "schema": {}, "end": ""}]
    StructuredOutputsParams(structural_tag={**tag, "at_least_one": True})
    with pytest.raises(InvalidRequestError, match="stop_after_first of structural_tag must be"):
        StructuredOutputsParams(structural_tag={**tag, "stop_after_first": 1})
    tag["structures"] = [{"begin": "<", "end": ""}]
    with pytest.raises(InvalidRequestError, match="each of the structures of structural_tag"):
        StructuredOutputsParams(structural_tag=tag)


def test_whitespace_belongs_to_json() -> None:
    with pytest.raises(InvalidRequestError, match="whitespace_pattern must be None without json"):
        StructuredOutputsParams(regex="a", whitespace_pattern=" ")
    with pytest.raises(InvalidRequestError, match="with disable_any_whitespace"):
        StructuredOutputsParams(json={}, whitespace_pattern=" ", disable_any_whitespace=True)
    assert StructuredOutputsParams(json={}, whitespace_pattern=" ?").spec.whitespace_pattern == " ?"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json", {"const": "x" * 5_000_000}),
        ("json", '{"const": "' + "x" * 5_000_000 + '"}'),
        ("regex", "a" * 5_000_000),
        ("choice", [f"{i:01000}" for i in range(5000)]),
        ("grammar", 'start: "' + "a" * 5_000_000 + '"'),
    ],
)
def test_what_is_too_long_is_refused_at_once(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must have at most 1000000 characters"):
        StructuredOutputsParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json", nested(10_000)),
        ("json", '{"items":' * 10_000 + "{}" + "}" * 10_000),
        ("regex", "(" * 10_000 + "a" + ")" * 10_000),
        ("grammar", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
        ("grammar", "start: /" + "(" * 10_000 + "a" + ")" * 10_000 + "/"),
        ("grammar", "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000),
    ],
    ids=["dict", "json", "regex", "lark", "lark regex", "gbnf"],
)
def test_what_is_nested_too_deep_is_refused_at_once(name: str, value: object) -> None:
    """Without recursion of our own, and before any library recurses to the end of its stack."""
    with pytest.raises(InvalidRequestError, match=f"{name} must be nested at most 100 levels"):
        StructuredOutputsParams(**{name: value})


def test_a_schema_that_holds_itself_is_refused() -> None:
    schema: dict = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(InvalidRequestError, match="nested at most"):
        StructuredOutputsParams(json=schema)


def test_brackets_in_literals_do_not_count() -> None:
    literals = " ".join(['"("'] * 200)
    assert StructuredOutputsParams(grammar=f"start: {literals}").spec.kind == "grammar"
    assert StructuredOutputsParams(grammar=f"root ::= {literals} [(]").spec.kind == "grammar"
    assert StructuredOutputsParams(json={"const": "{" * 200}).spec.kind == "json"
    assert StructuredOutputsParams(regex=r"\(" * 200).spec.kind == "regex"


def test_a_pydantic_class_stands_for_its_schema() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str
        age: int

    params = StructuredOutputsParams(json=Person)
    assert params.json == Person.model_json_schema()
    assert params.spec == StructuredOutputsParams(json=Person.model_json_schema()).spec


def test_equal_constraints_have_equal_specs_however_they_are_written() -> None:
    """A dict and its JSON are compiled once; another backend or whitespace is another."""
    one = StructuredOutputsParams(json={"type": "object", "title": "é"})
    two = StructuredOutputsParams(json='{"type":"object",  "title": "\\u00e9"}')
    assert one.spec == two.spec
    assert hash(one.spec) == hash(two.spec)
    assert one.spec != StructuredOutputsParams(json=one.json, disable_any_whitespace=True).spec


def test_they_are_copied_pickled_and_cannot_be_changed() -> None:
    for kind, value in GOOD.items():
        params = StructuredOutputsParams(**{kind: value})
        for twin in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
            assert twin == params
            assert twin.spec == params.spec
        with pytest.raises(AttributeError):
            params.regex = "b"  # type: ignore[misc]
        sampling = SamplingParams(structured_outputs=params)
        assert sampling.clone().structured_outputs is params
        assert pickle.loads(pickle.dumps(sampling)) == sampling


def test_sampling_params_take_a_dict_of_fields() -> None:
    params = SamplingParams(structured_outputs={"regex": "a"})
    assert params.structured_outputs == StructuredOutputsParams(regex="a")
    with pytest.raises(TypeError, match=r"'regexp': did you mean 'regex'"):
        SamplingParams(structured_outputs={"regexp": "a"})
    with pytest.raises(InvalidRequestError, match="exactly one of"):
        SamplingParams(structured_outputs={})


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a"',
        '%llguidance {}\n\nstart: "a"',
        '?start: "a"',
        'A: "b"\n  start : A',
        "!start:A",
    ],
)
def test_lark_is_told_by_its_start(grammar: str) -> None:
    assert is_lark(grammar)


@pytest.mark.parametrize("grammar", ['root ::= "a"', 'root ::= start\nstart ::= "a: b"'])
def test_gbnf_is_what_has_no_such_start(grammar: str) -> None:
    assert not is_lark(grammar)


@given(st.recursive(st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_any_json_that_is_no_schema_is_refused_by_name(value: object) -> None:
    """Whatever is handed over, the error is ours."""
    with pytest.raises(InvalidRequestError, match="json must"):
        StructuredOutputsParams(json=value)  # type: ignore[arg-type]
