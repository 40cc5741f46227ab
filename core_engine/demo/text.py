"""The demo model's training text and its evaluation sets, all made from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from quire.demo.chats import chat_sample, follow_up_questions, memory_questions
from quire.demo.countries import country_questions, country_sample
from quire.demo.records import (
    reading_questions,
    record_questions,
    record_sample,
    validity_questions,
)
from quire.demo.samples import Question, Sample
from quire.demo.sentences import sentence_sample
from quire.demo.sums import sum_questions, sum_sample
from quire.demo.tools import (
    call_questions,
    no_call_questions,
    response_questions,
    several_calls_questions,
    tool_sample,
)

MIXTURE = (
    (0.24, country_sample),
    (0.19, sum_sample),
    (0.16, chat_sample),
    (0.11, record_sample),
    (0.10, sentence_sample),
    (0.20, tool_sample),
)
"""The share of each kind of sample, by number."""


def training_samples(seed: int) -> Iterator[Sample]:
    """Yield samples without end, the same ones for the same seed.

    Parameters
    ----------
    seed : int
        Any integer.
    """
    rng = random.Random(seed)
    weights = [share for share, _ in MIXTURE]
    makers = [make for _, make in MIXTURE]
    while True:
        (make,) = rng.choices(makers, weights)
        yield make(rng)


def evaluation_sets() -> dict[str, list[Question]]:
    """Return the held-out questions by name; no training sample holds any of them."""
    return {
        "capitals": list(country_questions("capital")),
        "countries of capitals": list(country_questions("country")),
        "continents": list(country_questions("continent")),
        "languages": list(country_questions("language")),
        "currencies": list(country_questions("currency")),
        "arithmetic": list(sum_questions()),
        "chat: remembering": list(memory_questions()),
        "chat: follow-ups": list(follow_up_questions()),
        "JSON: prescribed keys": list(record_questions()),
        "JSON: reading a sentence": list(reading_questions()),
        "tools: one call": list(call_questions()),
        "tools: several calls": list(several_calls_questions()),
        "tools: none needed": list(no_call_questions()),
        "tools: answers from responses": list(response_questions()),
    }


def sampled_sets() -> dict[str, list[Question]]:
    """Return the prompts whose answers are drawn at temperature 1, not greedily."""
    return {"JSON: valid when sampled": list(validity_questions(192))}
