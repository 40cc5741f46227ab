"""Short conversations in which a later turn needs an earlier one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quire.demo.countries import SYSTEM_PROMPTS, fill
from quire.demo.facts import (
    ANIMALS,
    CITIES,
    COLORS,
    COUNTRIES,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    SMALL_TALK,
    Country,
)
from quire.demo.samples import (
    Question,
    Sample,
    Turn,
    chat,
    chat_prompt,
    is_held_out,
    made_up_word,
    plain,
)


@dataclass(frozen=True, slots=True)
class Memo:
    """Something a user tells, and asks for later."""

    topic: str
    values: tuple[str, ...]
    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    answer: str


MEMOS: tuple[Memo, ...] = (
    Memo(
        "name",
        NAMES,
        ("My name is {v}.", "I am {v}.", "Hello, my name is {v}.", "Hi, I'm {v}.", "Call me {v}."),
        "Hello, {v}! How can I help you?",
        ("What is my name?", "Who am I?", "Do you remember my name?", "What's my name?"),
        "Your name is {v}.",
    ),
    Memo(
        "city",
        CITIES,
        ("I live in {v}.", "My home is in {v}.", "I am from {v}."),
        "{v} is a nice place to live.",
        ("Where do I live?", "Where am I from?", "Which city do I live in?"),
        "You live in {v}.",
    ),
    Memo(
        "color",
        tuple(COLORS),
        ("My favorite color is {v}.", "I like the color {v}."),
        "A good choice: {v} is a beautiful color.",
        ("What is my favorite color?", "Which color do I like?"),
        "Your favorite color is {v}.",
    ),
    Memo(
        "pet",
        tuple(ANIMALS),
        ("I have a pet {v}.", "My pet is a {v}."),
        "A {v} is a lovely pet.",
        ("Which pet do I have?", "What is my pet?"),
        "Your pet is a {v}.",
    ),
    Memo(
        "job",
        tuple(JOBS),
        ("I work as a {v}.", "My job is {v}."),
        "It must be interesting to be a {v}.",
        ("What is my job?", "What do I work as?"),
        "You work as a {v}.",
    ),
    Memo(
        "food",
        tuple(FOODS),
        ("My favorite food is {v}.", "I love to eat {v}."),
        "I hear that {v} can be delicious.",
        ("What is my favorite food?", "What do I love to eat?"),
        "Your favorite food is {v}.",
    ),
    Memo(
        "hobby",
        tuple(HOBBIES),
        ("My hobby is {v}.", "I enjoy {v}."),
        "Enjoy your {v}!",
        ("What is my hobby?", "What do I enjoy?"),
        "Your hobby is {v}.",
    ),
)

ASIDES: tuple[Turn, ...] = SMALL_TALK
"""What may come between telling and asking."""


def _system(rng: random.Random) -> list[Turn]:
    return [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.3 else []


def _aside(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.5:
        question, answer = rng.choice(ASIDES)
        return [("user", question), ("assistant", answer)]
    country = rng.choice(COUNTRIES)
    if is_held_out("What is the capital of {c}?", country.name):
        return _aside(rng)
    return [
        ("user", f"What is the capital of {country.name}?"),
        ("assistant", f"The capital of {country.name} is {country.capital}."),
    ]


def _train_value(memo: Memo, rng: random.Random) -> str:
    if memo.topic in ("name", "city", "job") and rng.random() < 0.35:
        word = made_up_word(rng)
        return word.lower() if memo.topic == "job" else word
    return rng.choice([v for v in memo.values if not is_held_out(memo.topic, v)])


def memory_sample(rng: random.Random) -> Sample:
    """A user tells one to three things; later turns ask for them."""
    turns = _system(rng)
    memos = rng.sample(MEMOS, rng.choice((1, 1, 1, 2, 3)))
    if memos[0].topic != "name" and rng.random() < 0.5:
        memos = [MEMOS[0], *(m for m in memos if m.topic != "name")]
    values = {memo.topic: _train_value(memo, rng) for memo in memos}
    for memo in memos:
        value = values[memo.topic]
        turns.append(("user", rng.choice(memo.told).format(v=value)))
        turns.append(("assistant", memo.reply.format(v=value)))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        turns += _aside(rng)
    rng.shuffle(memos)
    for memo in memos:
        turns.append(("user", rng.choice(memo.asked)))
        turns.append(("assistant", memo.answer.format(v=values[memo.topic])))
        if rng.random() < 0.1:
            turns += _aside(rng)
    return chat(turns)


FOLLOW_UPS = ("And of {c}?", "And {c}?", "What about {c}?", "And the capital of {c}?")
CITY_QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("In which country is it?", "{p} is in {c}.", "country"),
    ("On which continent is it?", "{p} is in {k}.", "continent"),
    ("Which language do people speak there?", "People in {p} speak {l}.", "language"),
)


def follow_up_sample(rng: random.Random) -> Sample:
    """Ask for a capital, then go on with a question that leans on the first one."""
    first = rng.choice(COUNTRIES)
    if is_held_out("What is the capital of {c}?", first.name):
        return follow_up_sample(rng)
    turns = _system(rng)
    turns.append(("user", f"What is the capital of {first.name}?"))
    turns.append(("assistant", f"The capital of {first.name} is {first.capital}."))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.35:
            question, answer, topic = rng.choice(CITY_QUESTIONS)
            if is_held_out("there", topic, first.name):
                continue
            turns.append(("user", question))
            turns.append(("assistant", fill(answer, first)))
            continue
        second = rng.choice(COUNTRIES)
        if is_held_out("follow", first.name, second.name):
            continue
        turns.append(("user", rng.choice(FOLLOW_UPS).format(c=second.name)))
        turns.append(("assistant", f"The capital of {second.name} is {second.capital}."))
        first = second
    return chat(turns)


def small_talk_sample(rng: random.Random) -> Sample:
    """A greeting, a thank-you, a question about the model itself; sometimes several."""
    question, answer = rng.choice(SMALL_TALK)
    if rng.random() < 0.3:
        prompt = question if question.endswith((".", "?", "!")) else question + "."
        return plain(prompt, " " + answer)
    turns = [*_system(rng), ("user", question), ("assistant", answer)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        turns += _aside(rng)
    return chat(turns)


def repeat_sample(rng: random.Random) -> Sample:
    """Say words again, known ones and made-up ones."""
    pools = (NAMES, CITIES, COLORS, ANIMALS, FOODS)
    words = [
        made_up_word(rng) if rng.random() < 0.6 else rng.choice(rng.choice(pools))
        for _ in range(rng.randint(1, 6))
    ]
    text = rng.choice((" ", " ", ", ")).join(words)
    prompt = rng.choice(("Repeat: {0}", "Say it again: {0}", "Repeat after me: {0}"))
    if rng.random() < 0.5:
        return plain(prompt.format(text) + "\n", text)
    return chat([("user", prompt.format(text)), ("assistant", text)])


def chat_sample(rng: random.Random) -> Sample:
    """Draw one conversation."""
    draw = rng.random()
    if draw < 0.15:
        return repeat_sample(rng)
    if draw < 0.60:
        return memory_sample(rng)
    if draw < 0.82:
        return follow_up_sample(rng)
    return small_talk_sample(rng)


def _contains(expected: str) -> Callable[[str], bool]:
    return lambda text: expected in text


def memory_questions() -> Iterator[Question]:
    """Held-out values: told in one turn, asked for in the next, or after one aside."""
    aside: list[Turn] = [
        ("user", "What is the capital of France?"),
        ("assistant", "The capital of France is Paris."),
    ]
    for memo in MEMOS:
        for value in memo.values:
            if not is_held_out(memo.topic, value):
                continue
            for told in memo.told:
                opening: list[Turn] = [
                    ("user", told.format(v=value)),
                    ("assistant", memo.reply.format(v=value)),
                ]
                asked: list[Turn] = [("user", memo.asked[0])]
                yield Question(chat_prompt(opening + asked), _contains(value))
                yield Question(chat_prompt(opening + aside + asked), _contains(value))


def held_out_follow_ups() -> Iterator[tuple[Country, Country, str]]:
    """Held-out pairs of countries, and what is asked of the second."""
    for number, (first, second) in enumerate(
        (a, b)
        for a in COUNTRIES
        for b in COUNTRIES
        if a is not b and is_held_out("follow", a.name, b.name)
    ):
        if number % 8 or is_held_out("What is the capital of {c}?", first.name):
            continue
        yield first, second, FOLLOW_UPS[number // 8 % len(FOLLOW_UPS)].format(c=second.name)


def follow_up_questions() -> Iterator[Question]:
    """'What is the capital of France?', then 'And of Germany?', of pairs that were held out."""
    for first, second, asked in held_out_follow_ups():
        turns: list[Turn] = [
            ("user", f"What is the capital of {first.name}?"),
            ("assistant", f"The capital of {first.name} is {first.capital}."),
            ("user", asked),
        ]
        yield Question(chat_prompt(turns), _contains(second.capital))
