"""The training text: a function of the seed, true, and free of what the evaluation asks."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.demo.countries import PHRASINGS, fill, spaced
from quire.demo.facts import COUNTRIES, EVENTS, PRESIDENTS
from quire.demo.records import parse_record
from quire.demo.samples import SPECIAL_TOKENS, TURN_END, Question, is_held_out
from quire.demo.sums import HELD_OUT_PROBLEMS, TRAINING_PROBLEMS, problems, result
from quire.demo.text import sampled_sets, training_samples

Questions = dict[str, list[Question]]

NUM_SAMPLES = 10_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The first samples of the shipped model's training text."""
    return [s.text for s in itertools.islice(training_samples(0), NUM_SAMPLES)]


@settings(max_examples=10, deadline=None)
@given(st.integers())
def test_the_same_seed_gives_the_same_samples(seed: int) -> None:
    """Generators draw from their seed alone."""
    first, second = (list(itertools.islice(training_samples(seed), 50)) for _ in range(2))
    assert first == second


def test_different_seeds_give_different_samples() -> None:
    """The seed is used."""
    first, second = (list(itertools.islice(training_samples(seed), 50)) for seed in (0, 1))
    assert first != second


def test_no_held_out_prompt_is_in_the_training_text(texts: list[str], held_out: Questions) -> None:
    """No evaluation prompt stands anywhere in the training text, in any case or spacing."""

    def plainly(text: str) -> str:
        return re.sub(r"\s+", "", text.lower())

    # Joined by a character of no sample, one search per prompt covers all samples.
    haystack = "\x00".join(plainly(text) for text in texts)
    for name, questions in held_out.items():
        for question in questions:
            assert plainly(question.prompt) not in haystack, (name, question.prompt)


def test_no_held_out_country_question_is_asked_in_any_form(texts: list[str]) -> None:
    """A held-out phrasing of a country is absent whatever template would surround it."""
    haystack = "\x00".join(texts).lower().replace(" ?", "?")
    held_out = [
        fill(phrasing.question, country).lower()
        for phrasing in PHRASINGS
        for country in COUNTRIES
        if is_held_out(phrasing.question, country.name)
    ]
    assert len(held_out) > 100
    assert not [question for question in held_out if question.rstrip("?.") in haystack]


def test_no_held_out_sum_is_in_the_training_text(texts: list[str]) -> None:
    """Neither a held-out problem nor a sum's mirror image is written out anywhere."""
    sign = {"plus": "+", "minus": "-", "times": "*", "+": "+", "-": "-", "*": "*"}
    pattern = re.compile(r"(?<!\d)(\d+) ?(\+|-|\*|plus|minus|times) ?(\d+)(?!\d)")
    held_out = set(HELD_OUT_PROBLEMS)
    seen = {(int(a), sign[op], int(b)) for text in texts for a, op, b in pattern.findall(text)}
    assert len(seen) > 600
    assert not seen & held_out
    assert {(b, op, a) for a, op, b in held_out if op == "+"} <= held_out


def test_every_problem_is_either_trained_or_held_out() -> None:
    """The split loses nothing and shares nothing."""
    assert sorted(TRAINING_PROBLEMS + HELD_OUT_PROBLEMS) == sorted(problems())
    assert not set(TRAINING_PROBLEMS) & set(HELD_OUT_PROBLEMS)


def test_written_sums_are_true(texts: list[str]) -> None:
    """The training text teaches no wrong arithmetic."""
    found = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", "\n".join(texts))
    assert len(found) > 1000
    assert all(result(int(a), op, int(b)) == int(total) for a, op, b, total in found)


def test_records_in_the_training_text_are_valid_json(texts: list[str]) -> None:
    """Every record that the model learns to write parses, whatever its layout."""
    told = [text for text in texts if "{" in text and "<tools>" not in text]
    answers = [re.sub(r"<\|\w+\|>", "", text[text.index("{") :]) for text in told]
    assert len(answers) > 1000
    assert all(parse_record(answer) is not None for answer in answers)


def test_chats_are_well_formed(texts: list[str]) -> None:
    """Turns open and close in pairs, and a chat ends with the assistant's turn."""
    chats = [text for text in texts if "<|im_start|>" in text]
    assert len(chats) > 1000
    turn = r"<\|im_start\|>(system|user|assistant)\n((?!<\|).)+<\|im_end\|>"
    whole = re.compile(rf"{turn}(\n{turn})*", re.DOTALL)
    for text in chats:
        assert whole.fullmatch(text), text
        assert text.rindex("<|im_start|>assistant") > text.rindex("<|im_start|>user")


def test_held_out_sets_are_large_enough_to_mean_something(held_out: Questions) -> None:
    """Each set has dozens of questions, all different."""
    for name, questions in (held_out | sampled_sets()).items():
        assert len(questions) >= 40, name
    for name, questions in held_out.items():
        assert len({q.prompt for q in questions}) == len(questions), name


def test_the_first_question_of_all_is_trained_on() -> None:
    """The manuals' example is not held out."""
    assert not is_held_out("What is the capital of {c}?", "France")


def test_facts_are_consistent() -> None:
    """Names and capitals are unique, years have one president, events have one."""
    assert len({c.name for c in COUNTRIES}) == len(COUNTRIES) >= 60
    assert len({c.capital for c in COUNTRIES}) == len(COUNTRIES)
    spans = sorted((first, last) for _, first, last in PRESIDENTS)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    for _, year in EVENTS:
        assert sum(first <= year <= last for first, last in spans) == 1


def test_checks_tell_right_from_wrong(held_out: Questions) -> None:
    """A question's check accepts no empty and no arbitrary answer."""
    for questions in held_out.values():
        for question in questions:
            assert not question.check("")
            assert not question.check("I do not know [] {} 999")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_only_objects_are_records(value: object) -> None:
    """JSON that is no object counts as invalid."""
    assert parse_record(json.dumps(value)) is None
    assert parse_record(json.dumps({"a": value})) == {"a": value}


def test_spacing_varies_only_what_does_not_matter() -> None:
    """Variants of a question differ in case, the mark and the space before it."""
    import random

    rng = random.Random(0)
    question = "What is the capital of France?"
    variants = {spaced(question, rng) for _ in range(200)}
    assert {"What is the capital of France ?", question} <= variants
    assert {v.lower().replace(" ", "").rstrip("?") for v in variants} == {
        "whatisthecapitaloffrance"
    }


def test_special_tokens_are_only_where_markup_is(texts: list[str]) -> None:
    """No text spells a special token but as the end of an answer or the border of a turn."""
    known = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for text in texts[:2000]:
        assert "<|" not in known.sub("", text)
        assert text.endswith((TURN_END, SPECIAL_TOKENS[0]))
