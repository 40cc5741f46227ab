"""Small arithmetic: sums, differences, products, and stories about them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from quire.demo.countries import BRIEF_SYSTEM_PROMPTS, SHORT_FORMS, STEPS_FORM, spaced
from quire.demo.facts import NAMES
from quire.demo.samples import Question, Sample, chat, chat_prompt, drill, is_held_out, plain

LARGEST_TERM = 20
LARGEST_FACTOR = 10
WORDS = {"+": "plus", "-": "minus", "*": "times"}
ASKED = (
    "What is {s}?",
    "What is {s}?",
    "What is {w}?",
    "How much is {s}?",
    "How much is {w}?",
    "Calculate {s}.",
    "{s}",
)
COUNTABLE = ("apples", "books", "coins", "stones", "pens", "eggs", "cards", "shells")


def result(a: int, op: str, b: int) -> int:
    """Compute ``a op b``."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def problems() -> list[tuple[int, str, int]]:
    """List every problem within the model's range; differences are never negative."""
    terms = range(LARGEST_TERM + 1)
    factors = range(LARGEST_FACTOR + 1)
    return (
        [(a, "+", b) for a in terms for b in terms]
        + [(a, "-", b) for a in terms for b in terms if b <= a]
        + [(a, "*", b) for a in factors for b in factors]
    )


def is_held_out_problem(a: int, op: str, b: int) -> bool:
    """Whether a problem is kept for evaluation, with both orders of a sum together.

    A product's mirror image stays in training: with tables this small, there is nothing else
    that an unseen product could be inferred from.
    """
    if op == "*":
        return a != b and is_held_out(op, a, b) and not is_held_out(op, b, a)
    return is_held_out(op, min(a, b), max(a, b))


TRAINING_PROBLEMS = tuple(p for p in problems() if not is_held_out_problem(*p))
HELD_OUT_PROBLEMS = tuple(p for p in problems() if is_held_out_problem(*p))


def _asked(a: int, op: str, b: int, rng: random.Random) -> str:
    symbolic = f"{a} {op} {b}" if rng.random() < 0.8 else f"{a}{op}{b}"
    words = f"{a} {WORDS[op]} {b}"
    return spaced(rng.choice(ASKED).format(s=symbolic, w=words), rng)


def _story(a: int, op: str, b: int, rng: random.Random) -> tuple[str, str, str]:
    name = rng.choice(NAMES)
    things = rng.choice(COUNTABLE)
    total = result(a, op, b)
    if op == "+":
        text = rng.choice(
            (
                f"{name} has {a} {things} and gets {b} more.",
                f"{name} has {a} {things}. A friend gives {name} {b} more {things}.",
            )
        )
    elif op == "-":
        text = rng.choice(
            (
                f"{name} has {a} {things} and gives away {b}.",
                f"{name} has {a} {things} and loses {b} of them.",
            )
        )
    else:
        text = f"{name} has {a} boxes with {b} {things} each."
    question = f"{text} How many {things} does {name} have?"
    return question, str(total), f"{a} {op} {b} = {total}. {name} has {total} {things}."


def _drill(rng: random.Random) -> Sample:
    """Several problems in lines, each result to be learned."""
    chosen = [rng.choice(TRAINING_PROBLEMS) for _ in range(rng.randint(4, 10))]
    return drill([(f"{a} {op} {b} =", f" {result(a, op, b)}") for a, op, b in chosen])


def sum_sample(rng: random.Random) -> Sample:
    """Draw one problem, plain or as a chat; or a drill of several."""
    if rng.random() < 0.25:
        return _drill(rng)
    a, op, b = rng.choice(TRAINING_PROBLEMS)
    total = result(a, op, b)
    sentence = f"{a} {op} {b} = {total}."
    short = str(total)
    draw = rng.random()
    if draw < 0.2:
        return plain(f"{a} {op} {b} =", f" {total}")
    question = _asked(a, op, b, rng)
    if draw < 0.3:
        question, short, sentence = _story(a, op, b, rng)
    if draw < 0.5:
        return plain(rng.choice(SHORT_FORMS[:5]).format(q=question), " " + short)
    if draw < 0.55:
        return plain(STEPS_FORM.format(q=question), f" {sentence} So the answer is {total}.")
    if draw < 0.75:
        return plain(question, " " + sentence)
    if draw < 0.82:
        system = ("system", rng.choice(BRIEF_SYSTEM_PROMPTS))
        return chat([system, ("user", question), ("assistant", short)])
    turns = [("user", question), ("assistant", sentence)]
    if rng.random() < 0.3:
        c, op, d = rng.choice(TRAINING_PROBLEMS)
        turns.append(("user", rng.choice(("And {0}?", "What about {0}?")).format(f"{c} {op} {d}")))
        turns.append(("assistant", f"{c} {op} {d} = {result(c, op, d)}."))
    return chat(turns)


def sum_questions() -> Iterator[Question]:
    """The held-out problems, bare, behind ``Question: … Answer:`` and as a chat."""
    for a, op, b in HELD_OUT_PROBLEMS:
        total = result(a, op, b)

        def check(text: str, total: int = total) -> bool:
            numbers = re.findall(r"\d+", text.split("=")[-1])
            return bool(numbers) and int(numbers[0]) == total

        question = f"What is {a} {op} {b}?"
        yield Question(question, check)
        yield Question(f"Question: {question}\nAnswer:", check)
        yield Question(chat_prompt([("user", question)]), check)
