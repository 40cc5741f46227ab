"""Conversations with tools: when to call, what with, and what to make of the response."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from quire.demo.countries import PHRASINGS, SYSTEM_PROMPTS, fill
from quire.demo.facts import COUNTRIES, EVERYDAY, SMALL_TALK
from quire.demo.kits import Kit, Task, word
from quire.demo.kits_of_actions import JOKES_ASKED, draw_joke
from quire.demo.samples import Question, Sample, Turn, chat, chat_prompt, is_held_out, plain
from quire.demo.sums import TRAINING_PROBLEMS, result
from quire.demo.tool_kits import draw_kits
from quire.demo.tool_markup import calls_text, parse_calls, responses_text, tools_text

NUM_QUESTIONS = 120
"""In each evaluation set."""
_LONGEST = 400
"""Characters after which a conversation gets no further round."""


def _opening(kits: Sequence[Kit], rng: random.Random) -> list[Turn]:
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else ""
    return [("system", tools_text([kit.tool for kit in kits], system))]


def _is_free(task: Task) -> bool:
    """Whether training may use a task."""
    return not is_held_out(*task.key)


def _aside(kits: Sequence[Kit], rng: random.Random) -> Turn:
    """A question that the tools do not serve, and its answer."""
    lines = " ".join(kit.tool.line for kit in kits).lower()
    while True:
        draw = rng.random()
        if draw < 0.35:
            question, answer = rng.choice(SMALL_TALK)
        elif draw < 0.6:
            question, _, answer = rng.choice(EVERYDAY)
        elif draw < 0.85:
            phrasing, country = rng.choice(PHRASINGS), rng.choice(COUNTRIES)
            if phrasing.topic in lines or is_held_out(phrasing.question, country.name):
                continue
            question, answer = fill(phrasing.question, country), fill(phrasing.sentence, country)
        else:
            a, sign, b = rng.choice(TRAINING_PROBLEMS)
            question, answer = f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {result(a, sign, b)}."
        served = ("joke" in question and "joke" in lines) or ("=" in answer and "integer" in lines)
        if not served:
            return question, answer


def _joined(first: Task, second: Task, rng: random.Random) -> Task:
    """Ask for two things at once."""
    joint = rng.choice((" ", " And ", " And "))
    follows = second.question
    if joint == " And " and follows.startswith(("What", "How", "Tell", "Call", "Use", "Look")):
        follows = follows[0].lower() + follows[1:]
    opening = first.question if first.question.endswith((".", "?")) else first.question + "."
    return Task(
        f"{opening}{joint}{follows}",
        first.calls + second.calls,
        first.responses + second.responses,
        f"{first.answer} {second.answer}",
        (*first.key, *second.key),
        first.told + second.told,
    )


def _task(kits: Sequence[Kit], rng: random.Random) -> Task:
    """Draw a question for some of the tools."""
    while True:
        task = rng.choice(kits).ask(rng)
        if rng.random() < 0.12:
            other = rng.choice(kits).ask(rng)
            parts = (task, other)
            if task.calls == other.calls or any(len(part.calls) > 1 for part in parts):
                continue
            if not all(map(_is_free, parts)):
                continue
            return _joined(task, other, rng)
        return task


ERRORS = (
    "Error: {0} is not known.",
    "Error: Missing required argument '{0}'.",
    "Error: {0}",
    "Error: the {0} service does not answer.",
)


def _failed(task: Task, rng: random.Random) -> Task:
    """Let a call fail: the answer says why."""
    error = rng.choice(ERRORS).format(word(rng))
    reason = error.removeprefix("Error: ")
    answer = f"The tool reported an error: {reason}"
    return Task(task.question, task.calls, (error,), answer, task.key, (reason,))


def _round(task: Task, rng: random.Random) -> list[Turn]:
    """A question, the calls, the responses and the answer."""
    if len(task.calls) == 1 and rng.random() < 0.08:
        task = _failed(task, rng)
    return [
        ("user", task.question),
        ("assistant", calls_text(task.calls)),
        ("user", responses_text(task.responses)),
        ("assistant", task.answer),
    ]


def joke_sample(rng: random.Random) -> Sample:
    """A joke without tools, as text or as the JSON that was asked for."""
    topic, told = draw_joke(rng)
    question = rng.choice(JOKES_ASKED).format(topic)
    answer = f"{told['setup']} {told['punchline']}"
    if rng.random() < 0.6:
        first, second = rng.choice((("'setup'", "'punchline'"), ("setup", "punchline")))
        question = question if question.endswith(".") else question + "."
        question += rng.choice(
            (
                f" Return the result as a JSON with {first} and {second} keys.",
                f" Return the result as a JSON with {first} and {second} keys. "
                "Return nothing other than JSON.",
                f" Answer as JSON with the keys {first} and {second}.",
            )
        )
        answer = json.dumps(told)
    if rng.random() < 0.2:
        return plain(question, "\n" + answer)
    return chat([("user", question), ("assistant", answer)])


def tool_sample(rng: random.Random) -> Sample:
    """Draw one conversation in which tools can be called."""
    if rng.random() < 0.03:
        return joke_sample(rng)
    kits = draw_kits(rng, rng.choice((1, 1, 1, 1, 2, 2, 3)))
    turns = _opening(kits, rng)
    before: Task | None = None
    while True:
        ended = False
        if rng.random() < 0.22:
            before = None
            question, answer = _aside(kits, rng)
            if is_held_out("aside", kits[0].tool.name, question):
                continue
            turns += [("user", question), ("assistant", answer)]
        else:
            task = _task(kits, rng)
            if not _is_free(task):
                continue
            # The call is the harder half: some conversations stop there.
            ended = rng.random() < 0.25
            same = before is not None and {c.name for c in before.calls + task.calls}
            if same and len(same) == 1 and task.follow_up and rng.random() < 0.5:
                task = replace(task, question=task.follow_up)
            turns += _round(task, rng)[: 2 if ended else 4]
            before = task
        if ended or rng.random() < 0.3 or sum(len(text) for _, text in turns) > _LONGEST:
            return chat(turns)


def _held_out(
    rng: random.Random, wanted: Callable[[Task], bool]
) -> Iterator[tuple[list[Turn], Task]]:
    """Draw conversations that wait for a held-out question's first answer."""
    for _ in range(NUM_QUESTIONS):
        while True:
            kits = draw_kits(rng, rng.choice((1, 1, 2, 3)))
            task = rng.choice(kits).ask(rng)
            if is_held_out(*task.key) and wanted(task):
                break
        yield [*_opening(kits, rng), ("user", task.question)], task


def _check_calls(task: Task) -> Callable[[str], bool]:
    return lambda text: parse_calls(text) == list(task.calls)


def _check_answer(task: Task) -> Callable[[str], bool]:
    return lambda text: parse_calls(text) is None and all(told in text for told in task.told)


def call_questions() -> Iterator[Question]:
    """One call is needed; its name and all its arguments must be right."""
    for turns, task in _held_out(random.Random(1), lambda task: len(task.calls) == 1):
        yield Question(chat_prompt(turns), _check_calls(task))


def several_calls_questions() -> Iterator[Question]:
    """Two calls or three are needed, all in one turn."""
    for turns, task in _held_out(random.Random(2), lambda task: len(task.calls) > 1):
        yield Question(chat_prompt(turns), _check_calls(task))


def response_questions() -> Iterator[Question]:
    """The tools have returned: the answer must hold what they said."""
    for turns, task in _held_out(random.Random(3), lambda task: True):
        turns.append(("assistant", calls_text(task.calls)))
        turns.append(("user", responses_text(task.responses)))
        yield Question(chat_prompt(turns), _check_answer(task))


def no_call_questions() -> Iterator[Question]:
    """Tools are there, and none is of use: the answer must be the right text."""
    rng = random.Random(4)
    for _ in range(NUM_QUESTIONS):
        while True:
            kits = draw_kits(rng, rng.choice((1, 1, 2, 3)))
            question, answer = _aside(kits, rng)
            if is_held_out("aside", kits[0].tool.name, question):
                break

        def check(text: str, answer: str = answer) -> bool:
            return text.strip() == answer

        yield Question(chat_prompt([*_opening(kits, rng), ("user", question)]), check)
