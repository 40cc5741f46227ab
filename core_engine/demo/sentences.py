"""Simple sentences, small stories, everyday facts, and judging a review."""

from __future__ import annotations

import random

from quire.demo.countries import SHORT_FORMS, STEPS_FORM, spaced
from quire.demo.facts import (
    ANIMALS,
    CITIES,
    COLORS,
    EVENTS,
    EVERYDAY,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    PRESIDENTS,
)
from quire.demo.samples import Sample, chat, made_up_word, plain, prose

PLACES = ("in the garden", "by the river", "in the forest", "on the hill", "near the house")
VERBS = ("sleeps", "runs", "plays", "eats", "waits", "sings")
GOOD = ("great", "awesome", "wonderful", "excellent", "delicious", "perfect", "lovely", "amazing")
BAD = ("terrible", "awful", "horrible", "boring", "bad", "dirty", "disgusting", "poor")
REVIEWED = ("restaurant", "film", "book", "hotel", "food", "show", "service", "place", "pizza")
CONTINUED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The future of AI is", ("small models that run everywhere.", "open and fast.")),
    ("The future is", ("open and fast.",)),
    ("The sun rises in", ("the east.",)),
    ("The sky is", ("blue.",)),
    ("The grass is", ("green.",)),
    ("Snow is", ("white and cold.",)),
    ("The president of the United States is", ("elected every four years.",)),
    ("The first president of the United States was", ("George Washington.",)),
    ("The quick brown fox", ("jumps over the lazy dog.",)),
    ("To be or not to be,", ("that is the question.",)),
    ("One, two, three,", ("four, five, six, seven, eight, nine, ten.",)),
    ("1, 2, 3,", ("4, 5, 6, 7, 8, 9, 10.",)),
    ("1 2 3 4", ("5 6 7 8 9 10",)),
)


def _sentence(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    color, animal = rng.choice(COLORS), rng.choice(ANIMALS)
    return rng.choice(
        (
            f"{name} lives in {rng.choice(CITIES)} and works as a {rng.choice(JOBS)}.",
            f"{name} likes {rng.choice(HOBBIES)} and {rng.choice(FOODS)}.",
            f"{name} and {other} are friends.",
            f"The {color} {animal} {rng.choice(VERBS)} {rng.choice(PLACES)}.",
            f"{name} has a {color} {animal}.",
            f"A {animal} {rng.choice(VERBS)} {rng.choice(PLACES)}.",
            f"{name} and {other} eat {rng.choice(FOODS)}.",
        )
    )


def _story(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    animal, color = rng.choice(ANIMALS), rng.choice(COLORS)
    return (
        f"Once upon a time there was a {color} {animal}. Its name was {name}. "
        f"One day {name} met {other}, who lived {rng.choice(PLACES)}. "
        f"{name} and {other} became friends, and they ate {rng.choice(FOODS)} together."
    )


def _introduction(rng: random.Random) -> Sample:
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    start = rng.choice(("Hello, my name is", "My name is", "Hi, my name is"))
    return plain(start, f" {name}. I live in {city} and I work as a {rng.choice(JOBS)}.")


def _everyday(rng: random.Random) -> Sample:
    question, short, sentence = rng.choice(EVERYDAY)
    question = spaced(question, rng)
    draw = rng.random()
    if draw < 0.35:
        return plain(rng.choice(SHORT_FORMS).format(q=question), " " + short)
    if draw < 0.65:
        return plain(question, " " + sentence)
    return chat([("user", question), ("assistant", sentence)])


def _president(rng: random.Random) -> Sample:
    if rng.random() < 0.4:
        name, first, last = rng.choice(PRESIDENTS)
        year = rng.randint(first, last)
        if first < last and rng.random() < 0.5:
            question = f"Who was the US president in {year}?"
            steps = f"{name} was the US president in {year}."
        else:
            start = rng.choice(("The US president in {y} was", "In {y} the US president was"))
            return plain(start.format(y=year), f" {name}.")
    else:
        event, year = rng.choice(EVENTS)
        name = next(n for n, first, last in PRESIDENTS if first <= year <= last)
        when = event[0].upper() + event[1:] + f" in {year}."
        if rng.random() < 0.3:
            question = f"In which year was it that {event}?"
            return plain(question, f" {when}")
        question = f"Who was the US president in the year {event}?"
        steps = f"{when} {name} was the US president in {year}."
    question = spaced(question, rng)
    draw = rng.random()
    if draw < 0.35:
        return plain(STEPS_FORM.format(q=question), f" {steps} So the answer is {name}.")
    if draw < 0.55:
        return plain(rng.choice(SHORT_FORMS[:4]).format(q=question), " " + name)
    if draw < 0.75:
        return plain(question, " " + steps)
    return chat([("user", question), ("assistant", steps)])


def _review(rng: random.Random) -> Sample:
    good = rng.random() < 0.5
    word, thing = rng.choice(GOOD if good else BAD), rng.choice(REVIEWED)
    review = rng.choice(
        (f"This {thing} is just {word}!", f"The {thing} was {word}.", f"What a {word} {thing}!")
    )
    prompt = rng.choice(
        (
            f"Review: {review}\nSentiment:",
            f"Is the review positive or negative?\n\nReview: {review}\nAnswer:",
            f"Is the following review positive or negative?\n\nReview: {review}\n\nAnswer:",
            f"Classify this sentiment: {review}",
        )
    )
    label = "Positive" if good else "Negative"
    if rng.random() < 0.4:
        return chat([("user", prompt), ("assistant", label)])
    return plain(prompt, " " + label)


def _reading(rng: random.Random) -> Sample:
    """Two people, and a question on one of them: the answer stands in the text."""
    first, second = rng.sample(NAMES, 2)
    values, told, asked = rng.choice(
        (
            (CITIES, "{n} lives in {v}.", "Where does {n} live?"),
            (JOBS, "{n} works as a {v}.", "What is {n}'s job?"),
            (COLORS, "{n} likes {v}.", "Which color does {n} like?"),
        )
    )
    if rng.random() < 0.3:
        first, second = made_up_word(rng), made_up_word(rng)
        values = (made_up_word(rng), made_up_word(rng))
    one, two = rng.sample(values, 2)
    context = " ".join((told.format(n=first, v=one), told.format(n=second, v=two)))
    name, value = rng.choice(((first, one), (second, two)))
    prompt = f"Context: {context}\nQuestion: {asked.format(n=name)}\nAnswer:"
    return plain(prompt, f" {value}")


def sentence_sample(rng: random.Random) -> Sample:
    """Draw one sample of everyday language."""
    draw = rng.random()
    if draw < 0.20:
        return _everyday(rng)
    if draw < 0.38:
        return _president(rng)
    if draw < 0.50:
        return _review(rng)
    if draw < 0.65:
        return _reading(rng)
    if draw < 0.72:
        return _introduction(rng)
    if draw < 0.78:
        start, ends = rng.choice(CONTINUED)
        return plain(start, " " + rng.choice(ends))
    if draw < 0.85:
        story = _story(rng)
        if rng.random() < 0.5:
            prompt = rng.choice(("Tell me a story.", "Write a short story.", "Tell me a story"))
            return chat([("user", prompt), ("assistant", story)])
        return prose(story)
    if draw < 0.90:
        prompt = rng.choice(("Write a sentence.", "Write a simple sentence.", "Say something."))
        return chat([("user", prompt), ("assistant", _sentence(rng))])
    return prose(" ".join(_sentence(rng) for _ in range(rng.randint(1, 4))))
