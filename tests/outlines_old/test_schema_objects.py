"""What generate.json takes becomes a schema, and objects have the members that it names."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

import jsonschema
import pytest
from genson import SchemaBuilder
from hypothesis import given
from hypothesis import strategies as st
from outlines.types import JsonSchema
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from quire import InvalidRequestError
from quire.integrations.outlines.schema_objects import closed, schema_of

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x"],
}


class Pet(BaseModel):
    name: str


class Owner(BaseModel):
    pets: list[Pet]
    friend: Pet | None = None


class Place(TypedDict):
    city: str
    zip: int


@dataclass
class Size:
    width: int
    height: int = 1


def add(a: int, b: Annotated[int, Field(gt=0)] = 2) -> int:
    return a + b


def mul(c: float, *, pet: Pet) -> float:
    return c


def schemas(leaf):
    names = st.sampled_from("abc")
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(names, inner, min_size=1).map(
                lambda members: {"type": "object", "properties": members}
            ),
            inner.map(lambda items: {"type": "array", "items": items}),
            st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
            st.tuples(inner, inner).map(
                lambda both: {"type": "object", "properties": {"a": both[0]}, "oneOf": [both[1]]}
            ),
            inner.map(
                lambda more: {
                    "type": "object",
                    "properties": {"d": {"type": "null"}},
                    "additionalProperties": more,
                }
            ),
        ),
        max_leaves=6,
    )


SCHEMAS = schemas(st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {}, True]))
VALUES = st.recursive(
    st.integers() | st.booleans() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(schema=SCHEMAS.filter(lambda schema: isinstance(schema, dict)), value=VALUES)
def test_a_closed_schema_allows_nothing_more(schema, value):
    """What the closed schema accepts, the schema does; and the user's dict stays as it is."""
    before = copy.deepcopy(schema)
    result = closed(schema)
    assert schema == before
    if jsonschema.Draft202012Validator(result).is_valid(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)


def test_members_that_nobody_named_are_not_allowed():
    """An object with properties is closed, at every level, and also behind a reference."""
    schema, _ = schema_of(Owner)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"pets": [{"name": "a"}], "friend": None})
    assert not validator.is_valid({"pets": [], "more": 1})
    assert not validator.is_valid({"pets": [{"name": "a", "more": 1}]})


@pytest.mark.parametrize(
    "schema",
    [
        {**POINT, "additionalProperties": {"type": "integer"}},
        {**POINT, "additionalProperties": True},
        {**POINT, "patternProperties": {"^z": {}}},
        {**POINT, "minProperties": 3},
        {"type": "object", "properties": {}, "required": ["x"]},
        {"allOf": [POINT, {"type": "object", "properties": {"z": {}}}]},
        {"$ref": "#/$defs/P", "properties": {"z": {}}, "$defs": {"P": POINT}},
        {**POINT, "anyOf": [{"properties": {"z": {}}}, {"required": ["z"]}]},
        {**POINT, "not": {"properties": {"x": {"const": 1}}}},
    ],
)
def test_what_says_more_of_members_stays_as_it_is(schema):
    """Where a schema speaks of further members, or combines several, nothing is added to it."""
    assert closed(schema) == schema


def test_names_and_values_are_no_keywords():
    """A member may be called as a keyword is, and an example may look like a schema."""
    schema = {**POINT, "examples": [{"not": 1}], "properties": {"not": {}, "oneOf": {}, "x": {}}}
    schema["required"] = ["not"]
    assert closed(schema) == {**schema, "additionalProperties": False}


def test_a_pydantic_model_may_allow_further_members():
    """``extra="allow"`` is honoured."""

    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        x: int

    schema, parse = schema_of(Open)
    assert schema["additionalProperties"] is True
    assert parse('{"x": 1, "y": 2}') == Open(x=1, y=2)


def test_alternatives_that_a_constant_tells_apart_are_closed():
    """A union of models with a discriminator, each without further members."""

    class Cat(BaseModel):
        kind: Literal["cat"]
        lives: int

    class Dog(BaseModel):
        kind: Literal["dog"]

    class Home(BaseModel):
        pet: Cat | Dog = Field(discriminator="kind")

    schema, _ = schema_of(Home)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"pet": {"kind": "cat", "lives": 9}})
    assert validator.is_valid({"pet": {"kind": "dog"}})
    assert not validator.is_valid({"pet": {"kind": "dog", "lives": 9}})


@pytest.mark.parametrize("form", [POINT, json.dumps(POINT), JsonSchema(POINT)])
def test_schemas_in_every_form_are_the_same(form):
    """A dict, JSON and Outlines' type of it."""
    schema, parse = schema_of(form)
    assert schema == {**POINT, "additionalProperties": False}
    assert parse('{"x": 1}') == {"x": 1}


def test_a_function_takes_what_comes_of_its_signature():
    """Each argument is required, has its annotation's schema, and there is no other."""
    schema, parse = schema_of(add)
    assert sorted(schema["required"]) == ["a", "b"]
    assert schema["additionalProperties"] is False
    validator = jsonschema.Draft202012Validator(schema)
    assert not validator.is_valid({"a": 1, "b": 0})
    assert add(**parse('{"a": 1, "b": 2}')) == 3


def test_arguments_may_have_any_name():
    """Also those that a pydantic model has a use for, and such as begin with an underscore."""

    def odd(json: int, model_config: int, _private: int, schema: int, *, copy: int) -> None: ...

    schema, _ = schema_of(odd)
    names = ["json", "model_config", "_private", "schema", "copy"]
    assert list(schema["properties"]) == schema["required"] == names


def test_a_function_without_arguments_takes_nothing():
    """An empty object."""

    def none() -> None: ...

    schema, _ = schema_of(none)
    assert jsonschema.Draft202012Validator(schema).is_valid({})
    assert not jsonschema.Draft202012Validator(schema).is_valid({"a": 1})


def test_what_a_partial_has_bound_is_not_asked_for():
    """The result goes into the partial itself."""
    schema, _ = schema_of(functools.partial(mul, pet=Pet(name="a")))
    assert list(schema["properties"]) == ["c"]
    schema, _ = schema_of(functools.partial(add, 1))
    assert list(schema["properties"]) == ["b"]


def test_objects_that_can_be_called_are_functions():
    """Methods and objects with ``__call__`` are asked for what they take."""

    class Adder:
        def __call__(self, left: int, right: int) -> int:
            return left + right

        def method(self, only: str) -> None: ...

    assert list(schema_of(Adder())[0]["properties"]) == ["left", "right"]
    assert list(schema_of(Adder().method)[0]["properties"]) == ["only"]


@pytest.mark.parametrize(
    ("value", "valid", "invalid"),
    [
        (Size, {"width": 1, "height": 2}, {"width": 1}),
        (Place, {"city": "a", "zip": 1}, {"city": "a", "zip": 1, "more": 1}),
    ],
)
def test_classes_with_annotations_are_objects(value, valid, invalid):
    """A dataclass or a TypedDict stands for what it is made of, which is returned as a dict."""
    schema, parse = schema_of(value)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(valid)
    assert not validator.is_valid(invalid)
    assert parse(json.dumps(valid)) == valid


def test_a_schema_builder_is_what_it_has_learned():
    """Genson's builder gives the schema of the objects it was shown."""
    builder = SchemaBuilder()
    builder.add_object({"name": "a", "age": 1})
    schema, _ = schema_of(builder)
    assert jsonschema.Draft202012Validator(schema).is_valid({"name": "b", "age": 2})
    assert not jsonschema.Draft202012Validator(schema).is_valid({"name": "b", "age": "c"})


def test_an_enum_is_one_of_its_values_or_of_its_functions():
    """Values as JSON; a function is what it takes, with definitions that its arguments need."""

    class Level(Enum):
        low = 1
        high = "high"

    class Operation(Enum):
        add = functools.partial(add)
        mul = functools.partial(mul)
        nothing = None

    schema, parse = schema_of(Level)
    assert schema["enum"] == [1, "high"]
    assert parse('"high"') == "high"
    schema, _ = schema_of(Operation)
    validator = jsonschema.Draft202012Validator(schema)
    for valid in ({"a": 1, "b": 2}, {"c": 1.5, "pet": {"name": "a"}}, None):
        assert validator.is_valid(valid)
    for invalid in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, {"c": 1.5, "pet": {}}, 1):
        assert not validator.is_valid(invalid)


def lambda_like(x, y: int): ...


def star(*values: int): ...


def unknown(x: Nowhere): ...  # type: ignore[name-defined]  # noqa: F821


class Empty(Enum):
    pass


class Strange:
    pass


class Unwritable(TypedDict):
    value: Strange


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda_like, "'x' has none"),
        (star, "not given by its name"),
        (unknown, "Nowhere"),
        (Empty, "Enum with members"),
        (Unwritable, "pydantic"),
        (Strange, "schema_object must be"),
        (3, "schema_object must be"),
        (None, "schema_object must be"),
        ([POINT], "schema_object must be"),
        (Literal["a"], "schema_object must be"),
        ("{", "no JSON"),
        ("[1]", "a JSON schema"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested"),
        (" " * 2_000_000, "characters"),
        ({"enum": [object()]}, "no JSON"),
    ],
)
def test_what_stands_for_no_schema_is_refused(wrong, reason):
    """With a reason, and before a model has anything to do."""
    with pytest.raises(InvalidRequestError, match=reason):
        schema_of(wrong)


@pytest.mark.parametrize("required", [5, [["x"]], [{}], "x", None])
def test_what_is_wrong_within_a_schema_is_left_to_the_library_to_refuse(required):
    """It has the words for it; here is nothing but a schema that stays as it is."""
    schema = {**POINT, "required": required}
    assert closed(schema) == schema


def test_what_fails_in_the_users_own_schema_is_a_refusal_with_the_reason():
    """Code of a model's, classes in place of objects, names that lead nowhere."""

    def fail(schema):
        raise ZeroDivisionError("by zero, in the model's own code")

    class Failing(BaseModel):
        model_config = ConfigDict(json_schema_extra=fail)

    class Lost(TypedDict):
        x: Nowhere  # noqa: F821

    for wrong in (Failing, BaseModel, SchemaBuilder, Lost):
        with pytest.raises(InvalidRequestError, match="makes no schema: "):
            schema_of(wrong)


def test_a_schema_too_deep_to_walk_is_refused():
    """A dict of 10,000 levels is an error with a reason, and no overflow."""
    deep: dict[str, object] = {}
    for _ in range(10_000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequestError, match="nested"):
        schema_of(deep)
