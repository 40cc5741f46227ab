"""Whatever output type Outlines takes: the text is one that Outlines' own reading of it accepts."""

from __future__ import annotations

import datetime
import enum
import json
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, Optional, TypedDict, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

import genson
import jsonschema
import outlines
import typing_extensions
from outlines import types
from outlines.types.dsl import (
    Alternatives,
    KleenePlus,
    KleeneStar,
    QuantifyBetween,
    QuantifyExact,
    QuantifyMaximum,
    QuantifyMinimum,
    Sequence,
    String,
    Term,
    python_types_to_terms,
    to_regex,
)
from outlines.types.dsl import Optional as Maybe
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from quire import InvalidRequestError, RequestFailedError, StructuredOutputsParams
from quire.integrations.outlines.output_types import structured_outputs_for

PROMPT = "the quick brown fox"
HARSH = {"temperature": 1.5, "max_tokens": 150}


NAMED = [  # Outlines gets more of them by and by
    getattr(types, name)
    for name in ("ipv4", "ipv6", "uuid4", "mac_address", "semver", "credit_card", "iban")
    if hasattr(types, name)
]
if hasattr(types, "credit_card"):  # one that is as new
    NAMED.append(bool | None)


class Colour(enum.Enum):
    red = "red"
    quoted = 'a "b" / c\n'
    three = 3


class Person(BaseModel):
    name: Annotated[str, Field(max_length=5)]
    age: Annotated[int, Field(ge=0, le=9)]


@dataclass
class Point:
    x: bool
    y: Annotated[int, Field(ge=-9, le=9)] = 0


class Flags(typing_extensions.TypedDict):
    on: bool
    off: typing_extensions.NotRequired[bool]


def schedule(hour: Literal[8, 9], confirmed: bool = False) -> None:
    """What a model calls."""


def texts(model, output_type, count=4, **options):
    """Return texts of some seeds; those that were cut off are left out."""
    found = []
    for seed in range(count):
        whole = {**HARSH, "seed": seed, "allow_incomplete": True, "n": 1, **options}
        text = model(PROMPT, output_type, **whole)
        if len(model.tokenizer.encode(text)) < 140:
            found.append(text)
    return found


@pytest.mark.parametrize(
    "output_type",
    [
        int,
        float,
        bool,
        Annotated[int, "described"],
        datetime.date,
        datetime.time,
        datetime.datetime,
        Literal["yes", "no/no", 1, True, 1.5, "a.b"],
        Colour,
        list[bool],
        list[Colour],
        dict[Literal["a", 1], bool],
        Union[int, Literal["none"]],
        Optional[bool],
        tuple[bool, Literal["x"]],
        tuple[int, ...],
        types.Choice(["one", "one more", 2]),
        types.Regex(r"[a-c]{2,4}/\d"),
        types.either("a b", types.digit + types.Regex("x?")),
        types.exactly(3, types.hex_str),
        types.locale.us.zip_code,
        "just this",
        *NAMED,
    ],
    ids=repr,
)
def test_texts_match_the_regex_that_outlines_makes_of_a_type(model, output_type):
    regex = to_regex(python_types_to_terms(output_type))
    found = texts(model, output_type)
    assert found
    for text in found:
        assert re.fullmatch(regex, text), (regex, text)


STRINGS = st.text(st.sampled_from('ab1 .-/"\\\n{é'), min_size=1, max_size=3)
TERMS = st.recursive(
    STRINGS.map(String) | st.sampled_from(["[a-c]", r"\d", r"x/?y", "[^a-z/]"]).map(types.Regex),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(Alternatives),
        st.lists(inner, min_size=1, max_size=3).map(Sequence),
        st.builds(Maybe, inner),
        st.builds(KleeneStar, inner),
        st.builds(KleenePlus, inner),
        st.builds(QuantifyExact, inner, st.integers(1, 2)),
        st.builds(QuantifyMinimum, inner, st.integers(0, 2)),
        st.builds(QuantifyMaximum, inner, st.integers(1, 2)),
        st.builds(QuantifyBetween, inner, st.integers(0, 1), st.integers(1, 2)),
    ),
    max_leaves=6,
)


@given(TERMS, st.integers(0, 99))
def test_texts_of_any_term_match_its_regex(model, term: Term, seed: int):
    for text in texts(model, term, count=1, seed=seed):
        assert re.fullmatch(to_regex(term), text)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 3, "minimum": 0}, "b": {"type": "null"}},
    "required": ["a"],
}
BUILDER = genson.SchemaBuilder()
BUILDER.add_object({"on": True, "off": None})


@pytest.mark.parametrize(
    ("output_type", "schema"),
    [
        (Person, Person.model_json_schema()),
        (Point, TypeAdapter(Point).json_schema()),
        (Flags, TypeAdapter(Flags).json_schema()),
        (schedule, {"required": ["hour"], "properties": {"hour": {"enum": [8, 9]}}}),
        (BUILDER, json.loads(BUILDER.to_json())),
        (types.JsonSchema(SCHEMA), SCHEMA),
        (types.JsonSchema(json.dumps(SCHEMA)), SCHEMA),
        (dict, {"type": "object"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_texts_are_valid_by_the_schema_of_a_type(model, output_type, schema):
    """And have no members that the type does not name, so that they can be passed on by ``**``."""
    found = texts(model, output_type, count=8)
    assert found
    for text in found:
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema).validate(value)
        if "properties" in schema:
            assert value.keys() <= schema["properties"].keys() | {"confirmed"}


@pytest.mark.parametrize(
    ("output_type", "type_of_text"),
    [
        (Union[Person, Literal["I don't know", "a/b\n"]], Union[Person, None]),
        (list[Person], list[Person]),
        (types.exactly(2, types.JsonSchema(SCHEMA)), None),
        (types.at_least(1, types.JsonSchema(SCHEMA)) + "!", None),
        (types.at_most(2, types.JsonSchema(SCHEMA)) + "!", None),
        (types.between(1, 2, types.JsonSchema(SCHEMA, whitespace_pattern="")) + "!", None),
        (types.optional("?") + types.either(types.JsonSchema(SCHEMA), "x"), None),
        ("?" + types.one_or_more(types.JsonSchema(SCHEMA)) + "!", None),
        (Optional[Point], None),
        (types.Choice([Person, "none"]), None),
    ],
    ids=repr,
)
def test_a_schema_inside_of_another_type_keeps_its_bounds(model, output_type, type_of_text):
    """Outlines' regex of a schema knows no bounds of numbers; what is generated keeps them."""
    constraint = structured_outputs_for(output_type)
    assert constraint is not None
    assert constraint.grammar is not None
    regex = to_regex(python_types_to_terms(output_type))
    found = texts(model, output_type, count=8, max_tokens=200)
    assert found
    for text in found:
        ages = [int(age) for age in re.findall(r'"(?:age|a|y)"\s?:\s?(-?\d+)', text)]
        assert all(-9 <= age <= 9 for age in ages)
        if type_of_text is not None and text[0] in "[{":
            TypeAdapter(type_of_text).validate_json(text)
        else:
            assert re.fullmatch(regex, text)


def test_whitespace_between_the_parts_of_json_is_as_outlines_says(model):
    """At most one space, unless a schema has a pattern of its own, which may be left out."""
    patterns = {None: " ?", "": "", " ": " ", "[\n]{1,2}": "[\n]{1,2}"}
    for given_pattern, meant in patterns.items():
        schema = types.JsonSchema(SCHEMA, whitespace_pattern=given_pattern)
        found = texts(model, schema, count=6)
        assert found
        for text in found:
            assert re.fullmatch(f"(?:{meant})?", re.split(r'"a"', text)[0][1:])


def test_grammars_go_to_the_engine_as_they_are(model):
    arithmetic = types.CFG(outlines.grammars.arithmetic)
    assert structured_outputs_for(arithmetic) == StructuredOutputsParams(
        grammar=outlines.grammars.arithmetic
    )
    for text in texts(model, types.CFG('start: "a" b+\nb: "b" | "c" b\n')):
        assert re.fullmatch("a(c*b)+", text)


def test_a_choice_of_texts_is_a_choice_of_the_engine():
    """Compiled to one automaton, whatever is in the texts; a Regex of a plain text is one."""
    for output_type in (Colour, types.Choice([each.value for each in Colour])):
        constraint = structured_outputs_for(output_type)
        assert constraint == StructuredOutputsParams(choice=["red", 'a "b" / c\n', "3"])
    assert structured_outputs_for(types.Regex("a.c")) == StructuredOutputsParams(regex="a.c")
    assert structured_outputs_for(types.Regex("abc")) == StructuredOutputsParams(choice=["abc"])


def test_none_is_any_text_and_a_constraint_is_itself(model):
    assert structured_outputs_for(None) is None
    date = StructuredOutputsParams(regex=r"\d{4}", backend="outlines_core")
    assert structured_outputs_for(date) == date
    assert structured_outputs_for(date, backend="llguidance") == date
    assert re.fullmatch(r"\d{4}", model(PROMPT, date, seed=1))


def test_anchors_and_flags_mean_in_a_regex_what_they_mean_to_python(model):
    for text in texts(model, types.Regex("^(?:ab|cd)$")):
        assert text in ("ab", "cd")


def test_schemas_that_are_true_or_false():
    """Everything is valid by the one, and nothing by the other, which is refused as it runs."""
    assert structured_outputs_for(types.JsonSchema("true")).json == {}
    assert structured_outputs_for(types.JsonSchema("false")).json == {"not": {}}


@given(st.data())
def test_texts_of_any_pydantic_model_are_read_by_it(model, data):
    """Optional and nested members, unions, defaults: what is finished is valid for the model."""
    scalars = st.sampled_from(
        [bool, Literal["x", 1], Annotated[int, Field(ge=-3, le=30)], Colour, None, datetime.date]
    )
    fields = st.dictionaries(st.sampled_from("abcd"), scalars, min_size=1, max_size=3)
    from pydantic import create_model

    def make(members, optional, inner):
        names = {name: (kind, ...) for name, kind in members.items()}
        if optional:
            names["e"] = (Optional[bool], None)
        if inner is not None:
            names["f"] = (inner, ...)
            names["g"] = (list[inner], Field(max_length=1))
        return create_model("Drawn", **names)

    flat = st.builds(make, fields, st.booleans(), st.none())
    drawn = data.draw(st.builds(make, fields, st.booleans(), st.none() | flat))
    for text in texts(model, drawn, count=1, seed=data.draw(st.integers(0, 99)), max_tokens=200):
        if text.endswith("}") and text.count("{") == text.count("}"):
            drawn.model_validate_json(text)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Outlines takes either TypedDict")
def test_the_typed_dict_that_outlines_does_not_take_is_told(model):
    with pytest.raises(TypeError, match="the TypedDict of typing_extensions"):
        model(PROMPT, TypedDict("Old", {"a": int}))


def test_a_schema_of_anything_may_stand_in_another_type(model):
    for text in texts(model, types.either(types.JsonSchema("true"), "x"), count=6):
        if text != "x":
            json.loads(text)


def test_a_schema_in_another_type_may_have_whitespace_of_its_own(model):
    union = types.either(types.JsonSchema(SCHEMA, whitespace_pattern="\n"), "none")
    found = [text for text in texts(model, union, count=12) if text != "none"]
    assert found
    assert all(re.fullmatch(r"[^\s]*(\n[^\s]+)*\s?", text) for text in found)


class Opaque:
    pass


class NoSchema(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    what: Opaque


@pytest.mark.parametrize(
    ("output_type", "error", "message"),
    [
        ({"type": "object"}, TypeError, r"is a dict: write outlines.types.JsonSchema"),
        (bytes, TypeError, r"bytes'> is none that Outlines takes"),
        (5j, TypeError, r"5j is none that Outlines takes"),
        (list[dict], TypeError, r"dict is one of inside of another type"),
        (list[bytes], TypeError, r"is none that Outlines takes"),
        (NoSchema, InvalidRequestError, r"NoSchema'> stands for no schema"),
        pytest.param(  # its repr has an address, and ids are the same in every process
            lambda x: x, InvalidRequestError, r"must have a type annotation", id="untyped lambda"
        ),
        (enum.Enum("Empty", []), InvalidRequestError, r"choice must be a list of at least one"),
        (types.Choice([]), InvalidRequestError, r"choice must be a list of at least one"),
        (types.Regex("("), RequestFailedError, r"regex cannot be enforced"),
        (types.isbn, RequestFailedError, r"look-around"),
        (types.CFG("start: missing"), RequestFailedError, r"grammar cannot be enforced"),
        (
            types.JsonSchema({"type": "array", "uniqueItems": True, "minItems": 2}),
            RequestFailedError,
            r"uniqueItems",
        ),
        (
            types.either(types.JsonSchema({"type": "array", "uniqueItems": True}), "none"),
            RequestFailedError,
            r"uniqueItems",
        ),
        (
            types.either(
                types.JsonSchema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "a"
            ),
            RequestFailedError,
            r"oneOf",
        ),
    ],
    ids=repr,
)
def test_what_is_no_output_type_is_refused_with_the_reason(model, output_type, error, message):
    with pytest.raises(error, match=message):
        model(PROMPT, output_type)


@pytest.mark.parametrize("backend", ["llguidance", "outlines_core", "xgrammar"])
def test_a_call_may_choose_what_enforces_its_type(model, backend):
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    text = model(PROMPT, types.Regex("[ab]{3}"), backend=backend)
    assert re.fullmatch("[ab]{3}", text)
    assert "on" in json.loads(model(PROMPT, Flags, backend=backend))
