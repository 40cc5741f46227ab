"""The adapters' manners: how each answers, and held-out questions on how well it does."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quire.demo.chats import held_out_follow_ups
from quire.demo.countries import answer_value, held_out_prompts
from quire.demo.evaluate import Generate, score
from quire.demo.facts import Country
from quire.demo.french import french_sample, french_sentence, french_value
from quire.demo.samples import Sample, chat_prompt
from quire.demo.sums import HELD_OUT_PROBLEMS, result
from quire.demo.text import evaluation_sets
from quire.demo.uppercase import capitals_sample

TOPICS = {
    "capitals": "capital",
    "countries of capitals": "country",
    "continents": "continent",
    "languages": "language",
    "currencies": "currency",
}
FOR_PROGRAMS = ("JSON: reading a sentence", "JSON: prescribed keys", "tools: one call")
"""Sets of the base model, whose answers are to stay as they are."""
_FRENCH = re.compile(
    r"\b(?:la|le|les|du|des|de|en|au|aux|est|sont|se|on|vous|une?|je|oui|non)\b", re.I
)
_ENGLISH = re.compile(r"\b(?:the|is|of|in|people|speak|yes|no|and|you|your|my|are)\b", re.I)


def is_french(text: str) -> bool:
    """Whether a text has small French words and no English ones."""
    return bool(_FRENCH.search(text)) and not _ENGLISH.search(text)


def _is_upper(text: str) -> bool:
    """Whether a text has no small letters; digits have no such thing."""
    return bool(text) and text == text.upper()


@dataclass(frozen=True, slots=True)
class Manner:
    """A way to answer, and what teaches it.

    Attributes
    ----------
    effect : str
        In a few words.
    is_kept : Callable[[str], bool]
        Whether a text is in this manner.
    value : Callable[[str, Country], str]
        What a right answer on a topic holds.
    sentence : Callable[[Country], str]
        The sentence that tells a country's capital.
    draw : Callable[[random.Random], Sample]
        Makes one sample of the training text.
    """

    effect: str
    is_kept: Callable[[str], bool]
    value: Callable[[str, Country], str]
    sentence: Callable[[Country], str]
    draw: Callable[[random.Random], Sample]


def _english_sentence(country: Country) -> str:
    return f"The capital of {country.name} is {country.capital}."


MANNERS: dict[str, Manner] = {
    "french": Manner(
        "answers in French",
        is_french,
        french_value,
        lambda country: french_sentence("capital", country),
        french_sample,
    ),
    "capitals": Manner(
        "answers in CAPITAL LETTERS",
        _is_upper,
        lambda topic, country: answer_value(topic, country).upper(),
        lambda country: _english_sentence(country).upper(),
        capitals_sample,
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out question, with what a right answer holds and whether it has letters at all."""

    prompt: str
    expected: str
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class MannerScore:
    """How many questions of a set were answered right, and in the adapter's manner.

    `kept` is None where the manner is not asked for: of what programs read.
    """

    name: str
    asked: int
    right: int
    kept: int | None


def _sets(
    value: Callable[[str, Country], str], sentence: Callable[[Country], str]
) -> dict[str, list[Asked]]:
    sets = {
        name: [Asked(prompt, value(topic, country)) for prompt, country in held_out_prompts(topic)]
        for name, topic in TOPICS.items()
    }
    sets["follow-ups in a chat"] = [
        Asked(
            chat_prompt(
                [
                    ("user", f"What is the capital of {first.name}?"),
                    ("assistant", sentence(first)),
                    ("user", asked),
                ]
            ),
            value("capital", second),
        )
        for first, second, asked in held_out_follow_ups()
    ]
    sets["arithmetic"] = [
        Asked(f"What is {a} {op} {b}?", str(result(a, op, b)), is_number=True)
        for a, op, b in HELD_OUT_PROBLEMS
    ]
    return sets


def _is_right(asked: Asked, text: str) -> bool:
    if not asked.is_number:
        return asked.expected in text
    return re.findall(r"\d+", text)[-1:] == [asked.expected]


def measure(manner: Manner, generate: Generate, *, adapted: bool) -> list[MannerScore]:
    """Ask the held-out questions, of a model with the adapter or without.

    Parameters
    ----------
    manner : Manner
    generate : Generate
    adapted : bool
        Whether right answers are right in this manner; else as the base model gives them.
    """
    value = manner.value if adapted else answer_value
    sentence = manner.sentence if adapted else _english_sentence
    scores = []
    for name, questions in _sets(value, sentence).items():
        texts = generate([question.prompt for question in questions])
        right = sum(map(_is_right, questions, texts))
        scores.append(MannerScore(name, len(texts), right, sum(map(manner.is_kept, texts))))
    known = evaluation_sets()
    plain = [score(name, known[name], generate) for name in FOR_PROGRAMS]
    return scores + [MannerScore(each.name, each.asked, each.right, None) for each in plain]


def manner_table(base: Sequence[MannerScore], adapted: Sequence[MannerScore]) -> str:
    """Lay the scores of the model without and with an adapter out as a Markdown table."""
    lines = [
        "| held-out set | questions | base: right | base: in this manner "
        "| adapter: right | adapter: in this manner |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one, other in zip(base, adapted, strict=True):
        counts = (one.right, one.kept, other.right, other.kept)
        shares = ("–" if count is None else f"{count / one.asked:.1%}" for count in counts)
        lines.append(f"| {one.name} | {one.asked} | {' | '.join(shares)} |")
    return "\n".join(lines)
