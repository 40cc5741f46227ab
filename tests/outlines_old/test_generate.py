"""The generators of the 0.x API on a running engine: results, nesting, streams, refusals."""

from __future__ import annotations

import datetime
import functools
import json
import pickle
import re
import threading
from enum import Enum

import pytest
from genson import SchemaBuilder
from hypothesis import given, settings
from hypothesis import strategies as st
from outlines import grammars, types
from pydantic import BaseModel, Field, field_validator

from quire import InvalidRequestError, QuireError, RequestFailedError, SamplingParams
from quire.errors import StructureIncompleteError
from quire.integrations.outlines import generate, samplers
from quire.integrations.outlines.generators import SequenceGenerator

PROMPT = "Describe a hero"
STORY = "Once upon"
HOT = samplers.multinomial(temperature=1.5)


class Weapon(str, Enum):
    sword = "Sword"
    axe = "Axe"


class Character(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)
    weapon: Weapon


def add(a: int, b: int) -> int:
    return a + b


class Operation(Enum):
    add = functools.partial(add)


def ask(generator, prompts=PROMPT, **options):
    return generator(prompts, use_tqdm=False, **{"seed": 1, **options})


# -- results --------------------------------------------------------------------------------------


def test_text_is_what_the_engine_says(llm, model):
    """generate.text returns the engine's own text, of 16 tokens if nobody says how many."""
    [output] = llm.generate(STORY, SamplingParams(temperature=0), use_tqdm=False)
    generator = generate.text(model, sampler=samplers.greedy())
    text = ask(generator, STORY)
    assert text == output.outputs[0].text
    longer = ask(generator, STORY, max_tokens=20)
    assert longer.startswith(text)
    assert longer != text


@pytest.mark.parametrize("seed", range(3))
def test_json_is_of_the_schema(model, seed):
    """A model class gives objects of it, whatever the temperature; a schema gives dicts."""
    character = ask(generate.json(model, Character, sampler=HOT), seed=seed)
    assert isinstance(character, Character)
    members = ask(generate.json(model, json.dumps(Character.model_json_schema()), HOT), seed=seed)
    assert members == character.model_dump(mode="json")
    assert ask(generate.json(model, Character.model_json_schema(), HOT), seed=seed) == members


def test_json_of_functions_can_be_passed_to_them(model):
    """A function's arguments come as a dict for ``**``; an Enum of functions likewise."""
    assert isinstance(add(**ask(generate.json(model, add, sampler=HOT))), int)
    assert set(ask(generate.json(model, Operation, sampler=HOT))) == {"a", "b"}


def test_json_of_a_schema_builder_is_like_what_it_has_learned(model):
    """What genson writes is enforced."""
    builder = SchemaBuilder()
    builder.add_object({"brave": True, "level": 1})
    members = ask(generate.json(model, builder, sampler=HOT))
    assert {name: type(value) for name, value in members.items()} == {"brave": bool, "level": int}


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [(None, "[ ]?"), ("", ""), (r"[\n ]?", r"[\n ]?"), ("[ ]{0,2}", "[ ]{0,2}")],
)
def test_whitespace_is_as_it_was_asked_for(model, pattern, allowed):
    """By default at most one space may stand between the parts of JSON, and "" is none."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    generator = generate.json(model, schema, HOT, whitespace_pattern=pattern)
    text = "".join(generator.stream(PROMPT, seed=3))
    assert re.fullmatch(allowed.join([r"\{", '"a"', ":", "1", r"\}"]), text)


def test_a_backend_that_takes_no_whitespace_pattern_is_not_given_one(llm):
    """On an engine of xgrammar, generate.json asks only for what it was asked for."""

    class Config:
        structured = type("Structured", (), {"structured_outputs_backend": "xgrammar"})

    class Other(type(llm)):
        def __init__(self):
            self.config = Config

        def __del__(self):
            pass

    other = Other.__new__(Other)
    other.config = Config
    assert generate.json(other, add).structured_outputs.whitespace_pattern is None
    assert generate.json(other, add, None, "[ ]").structured_outputs.whitespace_pattern == "[ ]"


@pytest.mark.parametrize("pattern", [r"([0-9]{1,3}\.){3}[0-9]{1,3}", types.uuid4])
def test_regex_matches(model, pattern):
    """A text matches the pattern, given as a str or as a type of Outlines."""
    text = ask(generate.regex(model, pattern, sampler=HOT))
    assert re.fullmatch(getattr(pattern, "pattern", pattern), text)


@pytest.mark.parametrize(
    "python_type",
    [int, float, bool, datetime.date, datetime.time, datetime.datetime],
)
def test_format_returns_values_of_the_type(model, python_type):
    """A value of the type itself, not its text."""
    assert type(ask(generate.format(model, python_type, sampler=HOT))) is python_type


def test_false_is_false(model):
    """The text False is read as False, which bool() would not do."""
    generator = generate.format(model, bool)
    assert [generator.format_sequence(text) for text in ("True", "False")] == [True, False]


def test_choice_is_one_of_them(model):
    """A str of a list; of an Enum a member's value; and of an Enum in format a member's name."""
    assert ask(generate.choice(model, ["Pizza", "Pasta (a+b)"], HOT)) in ("Pizza", "Pasta (a+b)")
    assert ask(generate.choice(model, types.Choice(["x", "y"]), HOT)) in ("x", "y")
    assert Weapon(ask(generate.choice(model, Weapon, HOT))) in Weapon
    assert ask(generate.format(model, Weapon, HOT)) in Weapon.__members__


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" | "b" more\nmore: "a" | "b" "a"',
        'root ::= "a" | "b" more\nmore ::= "a" | "b" "a"',
        types.CFG("start: /b{0,2}a/"),
    ],
)
def test_cfg_is_of_the_grammar(model, grammar):
    """Lark and GBNF, and Outlines' type of a grammar."""
    assert re.fullmatch("b{0,2}a", ask(generate.cfg(model, grammar, sampler=HOT)))


def test_grammars_of_outlines_are_taken(model):
    """Those that Outlines has in itself."""
    json.loads(ask(generate.cfg(model, grammars.json, samplers.greedy()), "true or false: "))


# -- nesting --------------------------------------------------------------------------------------


def shape(value):
    return [shape(item) for item in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize(
    ("prompts", "samples", "expected"),
    [
        ("a", 1, int),
        (["a"], 1, int),
        ("a", 2, [int, int]),
        (["a", "b", "c"], 1, [int, int, int]),
        (["a", "b", "c"], 2, [[int, int]] * 3),
    ],
)
def test_results_and_streams_are_nested_as_they_were(model, prompts, samples, expected):
    """Prompts, then samples; a level of one is left out, in results and in pieces alike."""
    generator = generate.format(model, int, sampler=samplers.multinomial(samples))
    assert shape(ask(generator, prompts)) == expected
    as_text = json.loads(json.dumps(expected, default=lambda kind: "str"))
    for piece in generator.stream(prompts, seed=1):
        assert json.loads(json.dumps(shape(piece), default=lambda kind: kind.__name__)) == as_text


def test_completions_of_sampling_params_are_a_list(model):
    """An n of SamplingParams is as good as samples of a sampler, and the object is not changed."""
    params = SamplingParams(n=2)
    generator = generate.json(model, Character)
    characters = ask(generator, sampling_params=params)
    assert shape(characters) == [Character, Character]
    assert params == SamplingParams(n=2)
    assert characters == ask(generate.json(model, Character, samplers.multinomial(2)))


def test_beams_come_best_first(llm, model):
    """beam_search(3) returns what the engine's search does."""
    found = ask(generate.text(model, sampler=samplers.beam_search(3)))
    search = SamplingParams(use_beam_search=True, n=3)
    [output] = llm.generate(PROMPT, search, use_tqdm=False)
    assert found == [completion.text for completion in output.outputs]


# -- arguments ------------------------------------------------------------------------------------


def test_a_seed_repeats_the_draws(model):
    """The same seed gives the same result, another most often another."""
    generator = generate.json(model, Character, sampler=HOT)
    assert ask(generator, seed=7) == ask(generator, seed=7)
    assert len({ask(generator, seed=seed).model_dump_json() for seed in range(4)}) > 1


def test_a_text_ends_at_stop_at(model):
    """One string or several; the string itself is left out."""
    generator = generate.text(model, sampler=samplers.greedy())
    whole = ask(generator, STORY, max_tokens=30)
    stop = whole.split()[2]
    assert ask(generator, STORY, max_tokens=30, stop_at=stop) == whole[: whole.index(stop)]
    assert ask(generator, STORY, max_tokens=30, stop_at=["~~", stop]) == whole[: whole.index(stop)]


def test_arguments_may_be_given_by_place(model):
    """prompts, max_tokens, stop_at, seed."""
    generator = generate.text(model)
    assert generator(PROMPT, 5, "~", 3, use_tqdm=False) == ask(generator, max_tokens=5, seed=3)


def test_a_function_of_the_users_own_formats(model):
    """format_sequence may be set, as many did."""
    generator = generate.choice(model, ["a", "b"])
    generator.format_sequence = str.upper
    assert ask(generator) in ("A", "B")


def test_a_progress_bar_is_shown_when_asked_for(model, capsys):
    """By default there is one, as there was; use_tqdm=False leaves it out."""
    generate.choice(model, ["a"])("x", use_tqdm=False)
    assert not capsys.readouterr().err
    generate.choice(model, ["a"])("x")
    assert "1/1" in capsys.readouterr().err


# -- streams --------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    samples=st.integers(1, 3),
    prompts=st.lists(st.sampled_from(["a", "Once upon a time", PROMPT]), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_pieces_of_a_stream_are_the_text_of_a_call(llm, samples, prompts, seed):
    """Joined per completion, the pieces are what a call returns before it is read as JSON."""
    generator = generate.json(llm, Character, sampler=samplers.multinomial(samples))
    generator.format_sequence = str
    called = ask(generator, prompts, seed=seed)
    texts = [[""] * samples for _ in prompts]
    for piece in generator.stream(prompts, seed=seed):
        rows = piece if len(prompts) > 1 else [piece]
        for i, row in enumerate(rows):
            for j, text in enumerate(row if samples > 1 else [row]):
                texts[i][j] += text
    if samples == 1:
        texts = [row[0] for row in texts]
    assert (texts if len(prompts) > 1 else texts[0]) == called


def test_a_stream_comes_in_pieces(model):
    """Not all at the end."""
    assert len(list(generate.regex(model, "[a-z]{20}").stream(PROMPT, seed=1))) > 5


def test_a_search_streams_its_end(model):
    """Beams are compared first, so they come in one piece."""
    generator = generate.text(model, sampler=samplers.beam_search(2))
    assert list(generator.stream(PROMPT)) == [ask(generator)]


@pytest.mark.parametrize("read", [0, 1])
def test_a_stream_that_is_dropped_ends_its_requests(llm, model, read):
    """Closing the iterator, read or not, aborts what runs."""
    pieces = generate.regex(model, "[a-z ]{2000}").stream(["a", "b"], max_tokens=200)
    for _ in range(read):
        next(pieces)
    pieces.close()
    del pieces
    for _ in range(200):
        if not llm.get_metrics()["num_unfinished_requests"]:
            return
        threading.Event().wait(0.01)
    raise AssertionError("requests still run")


def test_a_stream_refuses_at_once(llm, model):
    """A wrong argument or prompt is told by the call of stream, and leaves nothing running."""
    generator = generate.text(model)
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        generator.stream(PROMPT, max_tokens=0)
    with pytest.raises(InvalidRequestError):
        generator.stream([PROMPT, {"wrong": 1}], max_tokens=200)


# -- what does not end ----------------------------------------------------------------------------


def test_json_that_is_cut_off_is_an_error(model):
    """With what there is of it, and what to raise; the error survives a pickle."""
    generator = generate.json(model, Character)
    with pytest.raises(StructureIncompleteError, match="raise max_tokens") as caught:
        ask(generator, ["a", "b"], max_tokens=4)
    error = caught.value
    assert isinstance(error, QuireError)
    assert isinstance(error, ValueError)
    assert error.text.startswith("{")
    assert error.output.prompt == "a"
    assert error.output.outputs[0].text == error.text
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.text, again.output) == (str(error), error.text, error.output)


def test_the_room_in_the_context_is_the_default(llm, model):
    """Structures end when the context does, after more than 16 tokens, and plain text after 16."""
    with pytest.raises(StructureIncompleteError) as caught:
        ask(generate.regex(model, "[a-z]{5000}"))
    output = caught.value.output
    tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    assert tokens == llm.config.model.max_model_len == 256


@pytest.mark.parametrize("sampler", [None, samplers.multinomial(2), samplers.beam_search(2)])
def test_a_stream_that_is_cut_off_ends_with_an_error(model, sampler):
    """After all the pieces, with the whole text."""
    stream = generate.regex(model, "[a-z]{50}", sampler).stream(PROMPT, 6, seed=1)
    pieces = []
    with pytest.raises(StructureIncompleteError) as caught:
        pieces.extend(stream)
    texts = [piece if sampler is None else piece[0] for piece in pieces]
    assert caught.value.text == "".join(texts)
    assert len(caught.value.output.outputs[0].token_ids) == 6
    assert caught.value.output.outputs[0].text == caught.value.text


def test_plain_text_may_end_anywhere(model):
    """max_tokens is no error for text, called or streamed."""
    generator = generate.text(model)
    assert ask(generator, max_tokens=2) == "".join(generator.stream(PROMPT, 2, seed=1))


def test_json_that_a_stop_string_cut_off_is_an_error(model):
    """It names the string; a regex's text that is cut is what was asked for."""
    with pytest.raises(StructureIncompleteError, match=r"stop string '\"name'"):
        ask(generate.json(model, Character), stop_at='"name')
    assert ask(generate.regex(model, "[0-9]{3}-[0-9]{3}"), stop_at="-").isdigit()


def test_what_a_validator_refuses_is_its_own_error(model):
    """A whole text that the model's validators refuse: pydantic's error, as it was."""

    class Never(BaseModel):
        value: bool

        @field_validator("value")
        @classmethod
        def refuse(cls, value: bool) -> bool:
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one") as caught:
        ask(generate.json(model, Never))
    assert not isinstance(caught.value, StructureIncompleteError)


# -- what is refused ------------------------------------------------------------------------------


def test_an_llm_is_a_model(llm):
    """Without any adapter in between."""
    assert ask(generate.choice(llm, ["a"])) == "a"


@pytest.mark.parametrize("wrong", [None, "quire/demo", object(), SequenceGenerator])
def test_other_models_are_refused(wrong):
    """By every function, with what is for them."""
    for make in (
        lambda: generate.text(wrong),
        lambda: generate.json(wrong, Character),
        lambda: generate.choice(wrong, ["a"]),
    ):
        with pytest.raises(TypeError, match=r"model must be .*outlines\.Generator"):
            make()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda model: generate.regex(model, ""), "regex"),
        (lambda model: generate.regex(model, 3), "regex"),
        (lambda model: generate.cfg(model, ""), "grammar"),
        (lambda model: generate.choice(model, []), "choice"),
        (lambda model: generate.choice(model, "abc"), "choices"),
        (lambda model: generate.choice(model, [1, 2]), "choice"),
        (lambda model: generate.choice(model, None), "choices"),
        (lambda model: generate.json(model, "{"), "json"),
        (lambda model: generate.text(model, samplers.greedy), "sampler"),
        (lambda model: generate.text(model)([]), "prompts"),
        (lambda model: generate.text(model)("a", max_tokens=0), "max_tokens"),
        (lambda model: generate.text(model)("a", stop_at=[""]), "stop"),
        (lambda model: generate.text(model)("a", seed="x"), "seed"),
        (lambda model: generate.text(model)("a", lora_request=1), "lora_request"),
    ],
)
def test_wrong_values_are_refused_by_name(model, make, named):
    """Before anything has run."""
    with pytest.raises(InvalidRequestError, match=named):
        make(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: generate.regex(model, "(a"),
        lambda model: generate.regex(model, "(?=a)b"),
        lambda model: generate.cfg(model, "start: missing"),
        lambda model: generate.json(model, {"type": "array", "uniqueItems": True}),
    ],
)
def test_what_cannot_be_enforced_fails_alone(model, make):
    """The call raises the reason, and the next one runs."""
    with pytest.raises(RequestFailedError, match="cannot be enforced"):
        ask(make(model))
    assert ask(generate.choice(model, ["a"])) == "a"
