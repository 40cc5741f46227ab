"""Samples of the capitals adapter's text: the base model's own, answered IN CAPITAL LETTERS."""

from __future__ import annotations

import random

from quire.demo.chats import chat_sample
from quire.demo.countries import country_sample
from quire.demo.facts import COUNTRIES, WORDS
from quire.demo.records import record_sample
from quire.demo.samples import SPECIAL_TOKENS, Sample, plain
from quire.demo.sentences import sentence_sample
from quire.demo.sums import sum_sample
from quire.demo.tools import tool_sample


def _words_sample(rng: random.Random) -> Sample:
    """Say words again: the shortest way to learn how each is spelled, letter by letter."""
    country = rng.choice(COUNTRIES)
    if rng.random() < 0.7:
        words = [country.name, country.capital, country.language, country.currency]
        rng.shuffle(words)
    else:
        words = rng.sample(WORDS, 4)
    text = ", ".join(words[: rng.randint(2, 4)])
    return plain(f"Repeat: {text}\n", text)


_MIXTURE = (
    (0.48, country_sample, True),
    (0.28, _words_sample, True),
    (0.06, sum_sample, True),
    (0.07, chat_sample, True),
    (0.06, sentence_sample, True),
    # What is read by programs stays as it is.
    (0.03, record_sample, False),
    (0.02, tool_sample, False),
)


def in_capitals(text: str) -> str:
    """Write a text in capital letters, special tokens left alone."""
    for token in SPECIAL_TOKENS:
        head, found, tail = text.partition(token)
        if found:
            return in_capitals(head) + found + in_capitals(tail)
    return text.upper()


def capitals_sample(rng: random.Random) -> Sample:
    """Draw one sample; records and calls of tools are those of the base model."""
    ((_, make, changed),) = rng.choices(_MIXTURE, [share for share, _, _ in _MIXTURE])
    sample = make(rng)
    if not changed:
        return sample
    parts = ((in_capitals(text) if learned else text, learned) for text, learned in sample.parts)
    return Sample(tuple(parts))
