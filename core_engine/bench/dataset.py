"""Dataset: recorded conversations as a workload, in the format of ShareGPT's files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quire.bench.workload import Workload
from quire.errors import QuireError

_ASKING = frozenset({"human", "user"})
_ANSWERING = frozenset({"gpt", "chatgpt", "assistant"})
_MIN_TOKENS = 4

Pair = tuple[str, str]
"""A conversation's first question and the first answer after it."""


def read_pairs(path: Path) -> list[Pair]:
    """Read the first question and answer of every conversation.

    The file is a JSON list of objects whose ``conversations`` are lists of turns
    ``{"from": "human" or "gpt", "value": text}``. Other speakers are passed over, and so are
    conversations without a question that is answered.

    Raises
    ------
    ValueError
        The file is not of that format; the message names the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds {_kind(entries)}, not a list of conversations")
    pairs = (_first_pair(entry, f"{path}: entry {i}") for i, entry in enumerate(entries))
    return [pair for pair in pairs if pair is not None]


def sample_pairs(
    pairs: Sequence[Pair],
    count_prompt: Callable[[str], list[int]],
    count_answer: Callable[[str], list[int]],
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    total_len: int,
    seed: int,
    name: str,
) -> Workload:
    """Draw pairs without replacement until enough have lengths that are asked for.

    Parameters
    ----------
    pairs : sequence of (str, str)
    count_prompt, count_answer : callable
        From a text to its token ids.
    num_prompts : int
    input_len, output_len, total_len : int
        Most tokens of a prompt, of an answer, and of both. Neither may have fewer than 4.
    seed : int
        Of the order in which they are drawn.
    name : str
        Of the dataset, for the workload's name.

    Raises
    ------
    ValueError
        Fewer pairs than `num_prompts` have such lengths.
    """
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    prompts: list[list[int]] = []
    output_lens: list[int] = []
    for i in order:
        if len(prompts) == num_prompts:
            break
        try:
            prompt, answer = count_prompt(pairs[i][0]), len(count_answer(pairs[i][1]))
        except (ValueError, QuireError) as error:
            start = ascii(pairs[i][0][:40])
            raise ValueError(f"{name}, the question that begins {start}: {error}") from error
        if (
            _MIN_TOKENS <= len(prompt) <= input_len
            and _MIN_TOKENS <= answer <= output_len
            and len(prompt) + answer <= total_len
        ):
            prompts.append(prompt)
            output_lens.append(answer)
    if len(prompts) < num_prompts:
        raise ValueError(
            f"{name} has {len(prompts)} of the {num_prompts} prompts asked for, among its "
            f"{len(pairs)} questions with an answer: those of {_MIN_TOKENS} to {input_len} tokens "
            f"whose answers have {_MIN_TOKENS} to {output_len}, and both {total_len} at most"
        )
    tokens_in, tokens_out = sum(map(len, prompts)), sum(output_lens)
    return Workload(
        f"{num_prompts} of {name} ({tokens_in} in, {tokens_out} out in all)", prompts, output_lens
    )


def _first_pair(entry: Any, where: str) -> Pair | None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_kind(entry)}, not an object")
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        found = _kind(turns) if "conversations" in entry else "missing"
        raise ValueError(f"{where}: 'conversations' is {found}, not a list of turns")
    question: str | None = None
    pair: Pair | None = None
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}, turn {number} is {_kind(turn)}, not an object")
        for field in ("from", "value"):
            if not isinstance(turn.get(field), str):
                found = _kind(turn[field]) if field in turn else "missing"
                raise ValueError(f"{where}, turn {number}: {field!r} is {found}, not a text")
        if pair is None:
            if turn["from"] in _ASKING and question is None:
                question = turn["value"]
            elif turn["from"] in _ANSWERING and question is not None:
                pair = question, turn["value"]
    return pair


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
