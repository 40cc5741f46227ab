"""What a kit is: a tool, and a way to ask for it; and the words that kits draw."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.demo.facts import ANIMALS, CITIES, COLORS, FOODS, HOBBIES, JOBS, NAMES
from quire.demo.samples import made_up_word
from quire.demo.tool_markup import Call, Tool


@dataclass(frozen=True, slots=True)
class Task:
    """A question that needs tools, all the way to its answer.

    Attributes
    ----------
    question : str
    calls : tuple[Call, ...]
        What the model is to call.
    responses : tuple[str, ...]
        What the tools return, in this order.
    answer : str
        What the model makes of it.
    key : tuple[object, ...]
        The combination that is held out, or not, as a whole.
    told : tuple[str, ...]
        What an answer must hold at the least, from the responses.
    follow_up : str
        The question in short, right after one of the same kind; empty if there is none.
    """

    question: str
    calls: tuple[Call, ...]
    responses: tuple[str, ...]
    answer: str
    key: tuple[object, ...]
    told: tuple[str, ...]
    follow_up: str = ""


@dataclass(frozen=True, slots=True)
class Kit:
    """A tool, and a way to draw questions for it.

    Attributes
    ----------
    purpose : str
        What it is for: two tools of one purpose never stand side by side.
    tool : Tool
    ask : Callable[[random.Random], Task]
    """

    purpose: str
    tool: Tool
    ask: Callable[[random.Random], Task]


def one(
    tool: Tool, question: str, arguments: dict[str, Any], response: str, answer: str, told: object
) -> Task:
    """A task of a single call, held out by its question and the tool's name."""
    call = Call(tool.name, arguments)
    return Task(question, (call,), (response,), answer, (tool.name, question), (str(told),))


def word(rng: random.Random) -> str:
    """A made-up word in small letters."""
    return made_up_word(rng).lower()


def number(rng: random.Random) -> int:
    """A whole number, small ones often."""
    return rng.randint(-9, -1) if rng.random() < 0.05 else rng.randrange(10 ** rng.randint(1, 4))


def function_name(rng: random.Random, *words: str) -> str:
    """Join words to a name in one of the ways in which programs name functions."""
    draw = rng.random()
    parts = [part for text in words for part in text.split("_")]
    if draw < 0.85:
        return "_".join(parts)
    if draw < 0.93:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    return "".join(part.capitalize() for part in parts)


def a(thing: str) -> str:
    """Put the article before a thing."""
    return f"an {thing}" if thing[0] in "aeio" else f"a {thing}"


def words(rng: random.Random, most: int = 4) -> str:
    """Some words, known ones and made-up ones."""
    pools = (NAMES, CITIES, COLORS, ANIMALS, FOODS, HOBBIES, JOBS)
    return " ".join(
        word(rng) if rng.random() < 0.5 else rng.choice(rng.choice(pools))
        for _ in range(rng.randint(1, most))
    )


_SCRIPTS = (
    "你好啊集团公司有限科技大学",
    "こんにちは株式会社さくら",
    "éüñçøåßłőă",
    "Приветмир",
    "안녕하세요",
)


def quoted(rng: random.Random) -> str:
    """A text that can only be copied, in any script."""
    if rng.random() < 0.3:
        return "".join(rng.choices(rng.choice(_SCRIPTS), k=rng.randint(2, 6)))
    text = words(rng, 3)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
