"""What callers write for prompts: one or many, told apart without a guess."""

from __future__ import annotations

import numpy as np
import pytest

from quire.errors import InvalidRequestError
from quire.prompts import as_conversations, as_prompts, as_single_prompt, one_per_prompt

TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "prompt", ["text", "", {"prompt": "text"}, {"prompt_token_ids": [1, 2]}, [1, 2, 3]]
)
def test_a_lone_prompt_is_a_list_of_one(prompt):
    assert as_prompts(prompt) == [prompt]
    assert as_single_prompt(prompt) == prompt


@pytest.mark.parametrize(
    "prompts", [["a", "b"], [[1], [2, 3]], ["a", {"prompt_token_ids": [1]}, [2]], ("a", "b")]
)
def test_several_prompts_of_any_kind_keep_their_order(prompts):
    assert as_prompts(prompts) == list(prompts)
    with pytest.raises(InvalidRequestError, match="one prompt is taken here"):
        as_single_prompt(prompts)


@pytest.mark.parametrize("prompts", [None, 3, b"bytes", {1, 2}, iter(["a"])])
def test_what_is_no_prompt_is_named_by_type(prompts):
    with pytest.raises(InvalidRequestError, match=type(prompts).__name__):
        as_prompts(prompts)


@pytest.mark.parametrize("prompts", [[], ()])
def test_an_empty_list_is_an_error(prompts):
    with pytest.raises(InvalidRequestError, match="at least one prompt"):
        as_prompts(prompts)


def test_conversations_are_one_or_many():
    assert as_conversations([TURN]) == [[TURN]]
    assert as_conversations([[TURN], [TURN, TURN]]) == [[TURN], [TURN, TURN]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "must be a list of messages"),
        (["hi"], "each message must be a dict with a 'role'"),
        ([{"content": "hi"}], "each message must be a dict with a 'role'"),
        ([[TURN], []], "conversation 1 must be a list of at least one message"),
        ([[TURN], TURN], "conversation 1 must be a list"),
    ],
)
def test_wrong_messages_say_which(messages, message):
    with pytest.raises(InvalidRequestError, match=message):
        as_conversations(messages)


def test_values_are_one_for_all_or_one_each():
    assert one_per_prompt("x", None, 2) == [None, None]
    assert one_per_prompt("x", (1, 2), 2) == [1, 2]
    with pytest.raises(InvalidRequestError, match="x has 1 entries for 2 prompts"):
        one_per_prompt("x", [1], 2)


def test_integers_of_numpy_are_token_ids():
    """A list of them is one prompt, as a list of Python's is."""
    ids = [np.int64(5), np.int32(6)]
    assert as_prompts(ids) == [ids]
    assert as_single_prompt(ids) == ids
