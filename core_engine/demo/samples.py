"""Samples of the training text: what is given, what is to be learned, what is held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

HELD_OUT_SHARE = 10
"""One combination in so many is kept for the evaluation."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A piece of training text, cut where a prompt ends and an answer begins.

    Attributes
    ----------
    parts : tuple[tuple[str, bool], ...]
        Text, and whether the model is to learn to write it (a prompt only sets the scene).
        Parts are tokenized one by one, as a prompt is at inference.
    """

    parts: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole text, special tokens spelled out."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Question:
    """One item of an evaluation set.

    Attributes
    ----------
    prompt : str
        What the model is given, special tokens spelled out.
    check : Callable[[str], bool]
        Whether a generated text is right.
    """

    prompt: str
    check: Callable[[str], bool]


Turn = tuple[str, str]
"""The role and the text of one message."""


def plain(prompt: str, answer: str) -> Sample:
    """A bare prompt and the text that continues it to its end."""
    return Sample(((prompt, False), (answer + END_OF_TEXT, True)))


def prose(text: str) -> Sample:
    """Running text, all of it to be learned."""
    return Sample(((text + END_OF_TEXT, True),))


def drill(lines: Sequence[tuple[str, str]], separator: str = "\n") -> Sample:
    """Prompts and their short answers, many in one text; each answer is to be learned."""
    parts: list[tuple[str, bool]] = []
    for number, (prompt, answer) in enumerate(lines):
        last = number == len(lines) - 1
        parts.append((prompt if number == 0 else separator + prompt, False))
        parts.append((answer + (END_OF_TEXT if last else ""), True))
    return Sample(tuple(parts))


def chat_prompt(turns: Sequence[Turn]) -> str:
    """Render a conversation that waits for its answer, exactly as the chat template does."""
    rendered = "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns)
    return f"{rendered}{TURN_START}assistant\n"


def chat(turns: Sequence[Turn]) -> Sample:
    """A conversation in chat markup; the assistant's turns are to be learned."""
    parts: list[tuple[str, bool]] = []
    given = ""
    for role, text in turns:
        given += f"{TURN_START}{role}\n"
        if role == "assistant":
            parts += [(given, False), (text + TURN_END, True)]
            given = "\n"
        else:
            given += f"{text}{TURN_END}\n"
    return Sample(tuple(parts))


def is_held_out(*key: object) -> bool:
    """Whether a combination belongs to the evaluation and must not be trained on.

    The choice depends on the key alone, so that it is the same in every run and for every seed.
    """
    digest = zlib.crc32("|".join(map(str, key)).encode())
    return (digest >> 8) % HELD_OUT_SHARE == 0


_CONSONANTS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDINGS = ("", "", "n", "r", "s", "l", "nd", "rt", "ck", "m")


def made_up_word(rng: random.Random) -> str:
    """A word that means nothing: what can only be copied teaches to copy."""
    syllables = range(rng.choice((2, 2, 3)))
    stem = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in syllables)
    return (stem + rng.choice(_ENDINGS)).capitalize()
