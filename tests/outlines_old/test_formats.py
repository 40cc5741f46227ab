"""Every text that the regex of a Python type allows can be read as that type."""

from __future__ import annotations

import datetime
import re
from enum import Enum
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import types
from pydantic import WithJsonSchema

from quire import InvalidRequestError, StructuredOutputsParams
from quire.integrations.outlines import formats
from quire.integrations.outlines.formats import format_of

TYPES = (int, float, bool, datetime.date, datetime.time, datetime.datetime)


@pytest.mark.parametrize("python_type", TYPES)
@given(data=st.data())
def test_texts_can_be_read(python_type, data):
    """A text of the language becomes a value of the type, never an error."""
    constraint, parse = format_of(python_type)
    text = data.draw(st.from_regex(constraint.regex, fullmatch=True))
    value = parse(text)
    assert type(value) is python_type
    if python_type in (bool, datetime.date, datetime.time, datetime.datetime):
        assert str(value) == text  # one text each


@given(st.dates())
def test_the_language_of_dates_has_every_date(date):
    """No day is left out."""
    assert re.fullmatch(formats.DATE, str(date))


@given(st.datetimes().map(lambda x: x.replace(microsecond=0)))
def test_the_language_of_datetimes_has_every_second(moment):
    """No second is left out."""
    assert re.fullmatch(formats.DATETIME, str(moment))
    assert re.fullmatch(formats.TIME, str(moment.time()))


@given(st.integers(0, 9999), st.integers(0, 99), st.integers(0, 99))
def test_the_language_of_dates_has_no_other(year, month, day):
    """A text that looks like a date, and is none, is not in the language."""
    text = f"{year:04}-{month:02}-{day:02}"
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        assert not re.fullmatch(formats.DATE, text)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_python_writes_them_are_in_the_language(number):
    """An int is written as an int, and a float as a float."""
    regex = formats.INTEGER if isinstance(number, int) else formats.FLOAT
    assert re.fullmatch(regex, str(number))


def test_an_enum_is_the_name_of_a_member():
    """As it was: names, and not values."""

    class Color(Enum):
        red = "#f00"
        green = "#0f0"

    assert format_of(Color) == (StructuredOutputsParams(choice=["red", "green"]), str)


def test_annotated_types_are_read_by_their_pattern():
    """Custom types of 0.x: a pattern in the JSON schema, and what is called with the text."""
    zip_code = Annotated[int, WithJsonSchema({"type": "string", "pattern": "[1-9][0-9]{4}"})]
    assert format_of(zip_code) == (StructuredOutputsParams(regex="[1-9][0-9]{4}"), int)


def test_types_of_outlines_are_texts():
    """A type of outlines.types constrains, and its text is returned."""
    assert format_of(types.uuid4) == (StructuredOutputsParams(regex=types.uuid4.pattern), str)
    assert format_of(types.CFG("start: /a/"))[0] == StructuredOutputsParams(grammar="start: /a/")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    constraint, _ = format_of(types.JsonSchema(schema))
    assert constraint.json == {**schema, "additionalProperties": False}
    constraint, _ = format_of(types.either("a", types.exactly(2, types.Regex("[b-d]"))))
    assert re.fullmatch(constraint.regex, "cd")
    assert re.fullmatch(constraint.regex, "a")


def test_a_schema_within_a_type_of_outlines_keeps_its_bounds():
    """Outlines' regex of it would lose them."""
    constraint, _ = format_of(types.either("none", types.JsonSchema({"maximum": 9})))
    assert '"maximum": 9' in constraint.grammar


@pytest.mark.parametrize("empty", [types.Choice([]), types.either(types.Choice([]))])
def test_a_choice_of_nothing_is_refused(empty):
    """Its regex would be that of the empty text."""
    with pytest.raises(InvalidRequestError, match="choice must be a list of at least one string"):
        format_of(empty)


@pytest.mark.parametrize("wrong", [str, complex, None, "int", 3, Annotated[int, "no pattern"]])
def test_other_types_are_refused(wrong):
    """A type without a text of its own is refused with what would be right."""
    with pytest.raises(TypeError, match="python_type must be int, float"):
        format_of(wrong)
