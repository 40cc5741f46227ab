"""What a router remembers of prompts."""

from __future__ import annotations

import json

import pytest

from quire.server.prefixes import Prefixes
from quire.server.ray_front import prompt_beginning


def test_the_longest_common_beginning_decides():
    prefixes = Prefixes(piece=4)
    prefixes.note(prefixes.keys(b"aaaabbbbcccc"), "one")
    prefixes.note(prefixes.keys(b"aaaadddd"), "two")
    both = {"one", "two"}
    assert prefixes.find(prefixes.keys(b"aaaabbbbeeee"), both) == "one"
    assert prefixes.find(prefixes.keys(b"aaaaddddeeee"), both) == "two"
    assert prefixes.find(prefixes.keys(b"aaaaffff"), both) == "two"  # the last that had it
    assert prefixes.find(prefixes.keys(b"bbbbcccc"), both) is None  # not from its beginning
    assert prefixes.find(prefixes.keys(b"aaaabbbbcccc"), {"three"}) is None
    prefixes.forget({"one"})
    assert prefixes.find(prefixes.keys(b"aaaabbbb"), both) == "one"


def test_short_prompts_have_a_key_and_few_are_kept():
    prefixes = Prefixes(piece=4, most=2)
    for text, owner in ((b"a", 1), (b"b", 2), (b"c", 3)):
        (key,) = prefixes.keys(text)
        prefixes.note([key], owner)
    assert prefixes.find(prefixes.keys(b"a"), {1, 2, 3}) is None
    assert prefixes.find(prefixes.keys(b"c"), {1, 2, 3}) == 3
    assert len(prefixes.keys(b"abcdefghi")) == 2  # what is not a whole piece is no key
    assert len(prefixes.keys(b"x" * 10**6)) == 64


def test_a_conversation_begins_as_its_first_part_does():
    first = [{"role": "user", "content": "x" * 500}]
    more = [*first, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    one, other = (
        prompt_beginning("POST", json.dumps({"model": "m", "messages": each}).encode())
        for each in (first, more)
    )
    assert other.startswith(one[: len(one) - 3])
    prefixes = Prefixes()
    prefixes.note(prefixes.keys(one), "a")
    assert prefixes.find(prefixes.keys(other), {"a"}) == "a"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"{}", b'{"prompt": ""}', b"\xff", b"[" * 10**5]
)
def test_what_has_no_prompt_begins_with_nothing(body):
    assert prompt_beginning("POST", body) == b""
    assert prompt_beginning("GET", b'{"prompt": "x"}') == b""
