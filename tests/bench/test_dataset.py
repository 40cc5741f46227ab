"""A dataset's conversations become prompts and lengths, and a damaged file says where it is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.dataset import read_pairs, sample_pairs

WORDS = st.lists(st.sampled_from(["a", "bc", "d"]), max_size=9).map(" ".join)
SPEAKERS = st.sampled_from(["human", "user", "gpt", "chatgpt", "assistant", "system", "bing"])
TURNS = st.lists(st.fixed_dictionaries({"from": SPEAKERS, "value": WORDS}), max_size=5)
ENTRIES = st.lists(st.fixed_dictionaries({"conversations": TURNS}), max_size=6)


def saved(folder: Path, content: object) -> Path:
    file = folder / "file.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def ids(text: str) -> list[int]:
    """A tokenizer whose tokens are words."""
    return [len(word) for word in text.split()]


@given(entries=ENTRIES)
def test_a_pair_is_the_first_question_and_the_first_answer_after_it(tmp_path, entries):
    """Whoever else speaks, and whatever follows; one without an answer is passed over."""
    pairs = iter(read_pairs(saved(tmp_path, entries)))
    for entry in entries:
        turns = entry["conversations"]
        asked = [i for i, t in enumerate(turns) if t["from"] in ("human", "user")]
        told = ("gpt", "chatgpt", "assistant")
        answers = [t for t in turns[asked[0] :] if t["from"] in told] if asked else []
        if answers:
            assert next(pairs) == (turns[asked[0]]["value"], answers[0]["value"])
    assert next(pairs, None) is None


@given(
    entries=ENTRIES,
    place=st.integers(0, 5),
    damage=st.sampled_from(
        [
            (7, "is a number, not an object"),
            ({}, "'conversations' is missing"),
            ({"conversations": None}, "'conversations' is null"),
            ({"conversations": ["hi"]}, "turn 0 is a text, not an object"),
            ({"conversations": [{"from": "human"}]}, "turn 0: 'value' is missing"),
            ({"conversations": [{"from": [], "value": ""}]}, "turn 0: 'from' is a list"),
        ]
    ),
)
def test_a_damaged_entry_is_named(tmp_path, entries, place, damage):
    """Wherever it is in the file, with what is wrong with it."""
    place = min(place, len(entries))
    entries = [*entries[:place], damage[0], *entries[place:]]
    with pytest.raises(ValueError) as caught:
        read_pairs(saved(tmp_path, entries))
    assert f"file.json: entry {place}" in str(caught.value)
    assert damage[1] in str(caught.value)


def test_a_mark_at_the_start_of_a_file_is_passed_over(tmp_path):
    """Some editors begin UTF-8 with one."""
    file = tmp_path / "data.json"
    file.write_text("[]", encoding="utf-8-sig")
    assert read_pairs(file) == []


def test_a_text_that_cannot_be_tokenized_is_named():
    """By how it begins: its entry is no longer known."""

    def fail(text):
        raise ValueError("a lone surrogate")

    lens = {"num_prompts": 1, "input_len": 9, "output_len": 9, "total_len": 18, "seed": 0}
    with pytest.raises(ValueError, match=r"d\.json, the question that begins 'why.*surrogate"):
        sample_pairs([("why \ud800", "x")], fail, ids, name="d.json", **lens)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ('{"a": 1}', "holds an object, not a list"), (None, "cannot be read")],
)
def test_a_file_that_is_no_dataset_is_refused(tmp_path, content, message):
    """The message has the file's name and what it holds instead."""
    file = tmp_path / "data.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data\.json .*{message}"):
        read_pairs(file)


@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), max_size=20),
    num_prompts=st.integers(1, 4),
    lens=st.tuples(st.integers(4, 9), st.integers(4, 9), st.integers(8, 18)),
    seed=st.integers(0, 3),
)
def test_samples_have_the_lengths_asked_for(pairs, num_prompts, lens, seed):
    """They are drawn without replacement, the same for a seed, and refused only if too few fit."""
    fit = [
        (ids(p), len(ids(a)))
        for p, a in pairs
        if 4 <= len(ids(p)) <= lens[0]
        and 4 <= len(ids(a)) <= lens[1]
        and len(ids(p)) + len(ids(a)) <= lens[2]
    ]
    given_ = {"num_prompts": num_prompts, "input_len": lens[0], "output_len": lens[1]}
    given_ |= {"total_len": lens[2], "seed": seed, "name": "d.json"}
    if len(fit) < num_prompts:
        with pytest.raises(ValueError, match=rf"d\.json has {len(fit)} of the {num_prompts} "):
            sample_pairs(pairs, ids, ids, **given_)
        return
    work = sample_pairs(pairs, ids, ids, **given_)
    assert work == sample_pairs(pairs, ids, ids, **given_)
    assert len(work.prompts) == len(work.output_lens) == num_prompts
    for pair in zip(work.prompts, work.output_lens, strict=True):
        fit.remove(pair)
