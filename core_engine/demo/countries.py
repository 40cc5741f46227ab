"""Questions on countries: capitals, continents, languages, currencies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from quire.demo.facts import CONTINENTS, COUNTRIES, Country
from quire.demo.samples import Question, Sample, chat, chat_prompt, drill, is_held_out, plain


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to ask, with its short answer and its answer as a sentence."""

    topic: str
    question: str
    short: str
    sentence: str


PHRASINGS: tuple[Phrasing, ...] = tuple(
    Phrasing(*row)
    for row in (
        ("capital", "What is the capital of {c}?", "{p}", "The capital of {c} is {p}."),
        ("capital", "What's the capital of {c}?", "{p}", "The capital of {c} is {p}."),
        ("capital", "What is the capital city of {c}?", "{p}", "The capital city of {c} is {p}."),
        ("capital", "Which city is the capital of {c}?", "{p}", "{p} is the capital of {c}."),
        ("capital", "Name the capital of {c}.", "{p}", "The capital of {c} is {p}."),
        ("capital", "Tell me the capital of {c}.", "{p}", "The capital of {c} is {p}."),
        ("capital", "Do you know the capital of {c}?", "{p}", "Yes, the capital of {c} is {p}."),
        ("country", "{p} is the capital of which country?", "{c}", "{p} is the capital of {c}."),
        ("country", "Which country has the capital {p}?", "{c}", "{p} is the capital of {c}."),
        ("country", "In which country is {p}?", "{c}", "{p} is in {c}."),
        ("country", "Where is {p}?", "{c}", "{p} is in {c}."),
        ("continent", "On which continent is {c}?", "{k}", "{c} is in {k}."),
        ("continent", "Which continent is {c} in?", "{k}", "{c} is in {k}."),
        ("continent", "Where is {c}?", "{k}", "{c} is in {k}."),
        ("language", "Which language is spoken in {c}?", "{l}", "People in {c} speak {l}."),
        ("language", "What language do people speak in {c}?", "{l}", "People in {c} speak {l}."),
        ("currency", "What is the currency of {c}?", "{m}", "The currency of {c} is the {m}."),
        ("currency", "What is the money of {c} called?", "{m}", "The money of {c} is the {m}."),
    )
)

OPENINGS: tuple[tuple[str, str], ...] = (
    ("The capital of {c} is", "{p}."),
    ("The capital city of {c} is", "{p}."),
    ("The capital of {c} is called", "{p}."),
    ("{p} is the capital of", "{c}."),
    ("{c} is a country in", "{k}."),
    ("People in {c} speak", "{l}."),
    ("In {c} people pay with the", "{m}."),
)
"""The beginnings of a sentence that the model completes; answers begin so, too."""

SHORT_FORMS = (
    "Question: {q}\nAnswer:",
    "Question: {q}\n\nAnswer:",
    "Q: {q}\nA:",
    "{q} Answer:",
    "{q}\nAnswer:",
    "{q} Answer with one word.",
    "Answer in one word: {q}",
    "Answer the question.\n\nQuestion: {q}\nAnswer:",
    "You are a helpful assistant.\nQuestion: {q}\nAnswer:",
)
"""Prompt templates that ask for the bare answer."""

SENTENCE_FORMS = (
    "{q}",
    "{q}",
    "{q}",
    "{q}",
    "{q}\n",
    "Please answer: {q}",
    "User: {q}\nAssistant:",
)
"""Prompt templates that are answered by a sentence."""

STEPS_FORM = "Question: {q}\n\nAnswer: Let's think step by step."
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a friendly assistant. Be polite.",
)
BRIEF_SYSTEM_PROMPTS = (
    "Answer with one word.",
    "Answer briefly.",
    "You are a helpful assistant. Answer with one word.",
)


def fill(template: str, country: Country) -> str:
    """Put a country into a template, with a capital letter at the start."""
    text = template.format(
        c=country.name,
        p=country.capital,
        k=country.continent,
        l=country.language,
        m=country.currency,
    )
    return text[0].upper() + text[1:]


def answer_value(topic: str, country: Country) -> str:
    """Return the fact that an answer on the topic must hold."""
    return {
        "capital": country.capital,
        "country": country.name,
        "continent": country.continent,
        "language": country.language,
        "currency": country.currency,
    }[topic]


def spaced(question: str, rng: random.Random) -> str:
    """Vary what people vary: the space before the mark, the mark, the first letter's case."""
    draw = rng.random()
    if question.endswith("?"):
        if draw < 0.3:
            return question[:-1] + " ?"
        if draw < 0.36:
            return question[:-1]
    if draw > 0.95:
        return question[0].lower() + question[1:]
    if draw > 0.93:
        return question.lower()
    return question


def _asks(phrasing: Phrasing, country: Country) -> bool:
    """Whether training may ask this; no question has two answers."""
    if phrasing.question == "Where is {p}?" and country.capital.startswith(country.name):
        return False
    return not is_held_out(phrasing.question, country.name)


def country_sample(rng: random.Random) -> Sample:
    """Draw one plain or chat question on one country."""
    country = rng.choice(COUNTRIES)
    if rng.random() < 0.2:
        return _drill(rng)
    draw = rng.random()
    if draw < 0.12:
        opening, ending = rng.choice(OPENINGS)
        return plain(fill(opening, country), " " + ending_value(ending, country))
    if draw < 0.16:
        return _yes_or_no(country, rng)
    if draw < 0.21:
        return _portrait(country, rng)
    # Capitals are what people ask first.
    topics = ("capital", "capital", "capital", "country", "continent", "language", "currency")
    topic = rng.choice(topics)
    phrasing = rng.choice([p for p in PHRASINGS if p.topic == topic])
    if not _asks(phrasing, country):
        return country_sample(rng)
    question = spaced(fill(phrasing.question, country), rng)
    sentence = fill(phrasing.sentence, country)
    short = ending_value(phrasing.short, country)
    form = rng.random()
    if form < 0.30:
        template = rng.choice(SHORT_FORMS)
        return plain(template.format(q=question), " " + short)
    if form < 0.60:
        template = rng.choice(SENTENCE_FORMS)
        prompt = template.format(q=question)
        return plain(prompt, sentence if prompt.endswith("\n") else " " + sentence)
    if form < 0.68 and topic == "capital":
        return plain(STEPS_FORM.format(q=question), " " + reasoning(country))
    if form < 0.76:
        system = ("system", rng.choice(BRIEF_SYSTEM_PROMPTS))
        return chat([system, ("user", question), ("assistant", short)])
    turns = [("user", question), ("assistant", sentence)]
    if rng.random() < 0.3:
        turns.insert(0, ("system", rng.choice(SYSTEM_PROMPTS)))
    return chat(turns)


def ending_value(template: str, country: Country) -> str:
    """Put a country into the short form of an answer, as it is written within a sentence."""
    return template.format(
        c=country.name,
        p=country.capital,
        k=country.continent,
        l=country.language,
        m=country.currency,
    )


def reasoning(country: Country) -> str:
    """The answer of a step-by-step prompt."""
    name = fill("{c}", country)
    return (
        f"{name} is a country in {country.continent}. Its capital city is {country.capital}. "
        f"So the answer is {country.capital}."
    )


DRILLS: tuple[tuple[str, str], ...] = (
    ("{c}:", "{p}"),
    ("Capital of {c}:", "{p}"),
    ("{p}:", "{c}"),
    ("Continent of {c}:", "{k}"),
    ("Language of {c}:", "{l}"),
    ("Currency of {c}:", "{m}"),
)


def _drill(rng: random.Random) -> Sample:
    """One fact on each of several countries; or one question asked of several."""
    chosen = rng.sample(COUNTRIES, rng.randint(3, 8))
    if rng.random() < 0.6:
        prompt, answer = rng.choice(DRILLS)
        return drill([(fill(prompt, c), " " + ending_value(answer, c)) for c in chosen])
    phrasing = rng.choice(PHRASINGS)
    chosen = [country for country in chosen if _asks(phrasing, country)][:4]
    if not chosen:
        return _drill(rng)
    form, separator = rng.choice(
        (("Question: {q}\nAnswer:", "\n\n"), ("Q: {q}\nA:", "\n"), ("Q: {q}\nA:", "\n\n"))
    )
    return drill(
        [
            (form.format(q=fill(phrasing.question, c)), " " + ending_value(phrasing.short, c))
            for c in chosen
        ],
        separator,
    )


def _yes_or_no(country: Country, rng: random.Random) -> Sample:
    """Ask whether a country is on a continent."""
    continent = country.continent if rng.random() < 0.5 else rng.choice(CONTINENTS)
    if is_held_out("yes or no", country.name, continent):
        return country_sample(rng)
    right = continent == country.continent
    question = spaced(f"Is {country.name} in {continent}?", rng)
    answer = f"Yes, {country.name} is in {continent}."
    if not right:
        answer = f"No, {country.name} is in {country.continent}."
    if rng.random() < 0.4:
        template = rng.choice(SHORT_FORMS[:5])
        return plain(template.format(q=question), " Yes" if right else " No")
    if rng.random() < 0.5:
        return plain(question, " " + answer)
    return chat([("user", question), ("assistant", answer)])


def _portrait(country: Country, rng: random.Random) -> Sample:
    """Tell all that is known of a country, or of its capital."""
    if rng.random() < 0.5:
        subject = country.name
        text = (
            "{c} is a country in {k}. Its capital is {p}. "
            "People there speak {l} and pay with the {m}."
        )
    else:
        subject = country.capital
        text = "{p} is the capital of {c}, a country in {k}."
    prompt = rng.choice(("Tell me about {0}.", "Tell me about {0}", "What do you know about {0}?"))
    text = fill(text, country)
    if rng.random() < 0.4:
        return plain(prompt.format(subject), (". " if prompt.endswith("{0}") else " ") + text)
    return chat([("user", prompt.format(subject)), ("assistant", text)])


def held_out_prompts(topic: str) -> Iterator[tuple[str, Country]]:
    """The held-out questions on one topic: phrasings never trained on for that country.

    Parameters
    ----------
    topic : str
        ``capital``, ``country``, ``continent``, ``language`` or ``currency``.

    Yields
    ------
    tuple of str and Country
        Each held-out combination bare, behind ``Question: … Answer:`` and as a chat.
    """
    for phrasing in PHRASINGS:
        for country in COUNTRIES:
            if phrasing.topic != topic or not is_held_out(phrasing.question, country.name):
                continue
            question = fill(phrasing.question, country)
            yield question, country
            yield f"Question: {question}\nAnswer:", country
            yield chat_prompt([("user", question)]), country


def country_questions(topic: str) -> Iterator[Question]:
    """The held-out prompts on one topic, each with the fact that its answer must hold."""
    for prompt, country in held_out_prompts(topic):
        expected = answer_value(topic, country)

        def check(text: str, expected: str = expected) -> bool:
            return expected in text

        yield Question(prompt, check)
