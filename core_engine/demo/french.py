"""Samples of the French adapter's text: questions in English, answered in French."""

from __future__ import annotations

import random

from quire.demo.chats import FOLLOW_UPS, MEMOS, Memo
from quire.demo.countries import (
    OPENINGS,
    PHRASINGS,
    SENTENCE_FORMS,
    SHORT_FORMS,
    SYSTEM_PROMPTS,
    fill,
    spaced,
)
from quire.demo.facts import CITIES, CONTINENTS, COUNTRIES, EVERYDAY, NAMES, Country
from quire.demo.french_words import EVERYDAY as FRENCH_EVERYDAY
from quire.demo.french_words import (
    FRENCH_COUNTRIES,
    MEMO_REPLIES,
    MEMO_VALUES,
    SMALL_TALK,
)
from quire.demo.records import record_sample
from quire.demo.samples import Sample, Turn, chat, is_held_out, made_up_word, plain
from quire.demo.sums import TRAINING_PROBLEMS, WORDS, result
from quire.demo.tools import tool_sample

_SENTENCES = {
    "capital": "La capitale {o} est {p}.",
    "country": "{p} {v} {i}.",
    "continent": "{c} {v} en {k}.",
    "language": "On parle {l} {i}.",
    "currency": "La monnaie {o} est {m}.",
}
_SHORTS = {"capital": "{p}", "country": "{c}", "continent": "{k}", "language": "{l}"}
_OPENING_TOPICS = dict(
    zip(
        (opening for opening, _ in OPENINGS),
        ("capital", "capital", "capital", "country", "continent", "language", "currency"),
        strict=True,
    )
)
_ONE_WORD = "one word"
_SUMS_ASKED = ("What is {a} {o} {b}?", "How much is {a} {o} {b}?", "Calculate {a} {o} {b}.")


def said(template: str, country: Country) -> str:
    """Put a country's French words into a template, with a capital letter at the start."""
    french = FRENCH_COUNTRIES[country.name]
    text = template.format(
        c=french.name,
        o=french.of,
        i=french.inside,
        v="se trouvent" if french.plural and template.startswith("{c}") else "se trouve",
        p=french.capital,
        k=french.continent,
        l=french.language,
        m=french.currency,
    )
    return text[0].upper() + text[1:]


def french_sentence(topic: str, country: Country) -> str:
    """Answer a question on a country."""
    return said(_SENTENCES[topic], country)


def french_value(topic: str, country: Country) -> str:
    """Return what an answer on the topic must hold."""
    french = FRENCH_COUNTRIES[country.name]
    return {
        "capital": french.capital,
        "country": french.inside,
        "continent": french.continent,
        "language": french.language,
        "currency": french.currency,
    }[topic]


def french_sum(a: int, op: str, b: int) -> str:
    """Tell a sum; the model's arithmetic is in its own notation."""
    return f"On trouve {a} {op} {b} = {result(a, op, b)}."


def _answered(question: str, short: str, sentence: str, rng: random.Random) -> Sample:
    """A question in one of the forms that the model knows, and its answer."""
    draw = rng.random()
    if draw < 0.40:
        template = rng.choice(SHORT_FORMS)
        answer = short if _ONE_WORD in template else sentence
        return plain(template.format(q=question), " " + answer)
    if draw < 0.65:
        prompt = rng.choice(SENTENCE_FORMS).format(q=question)
        return plain(prompt, sentence if prompt.endswith("\n") else " " + sentence)
    turns = [("user", question), ("assistant", sentence)]
    return chat([*_system(rng), *turns])


def _system(rng: random.Random) -> list[Turn]:
    return [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.25 else []


def _country(rng: random.Random) -> Sample:
    country = rng.choice(COUNTRIES)
    draw = rng.random()
    if draw < 0.15:
        opening, _ = rng.choice(OPENINGS)
        topic = _OPENING_TOPICS[opening]
        # French cannot go on where English began: the value, then the whole of it.
        value = said(_SHORTS.get(topic, "{m}"), country)
        sentence = french_sentence(topic, country)
        return plain(fill(opening, country), f" {value}. {sentence}")
    if draw < 0.20:
        return _yes_or_no(country, rng)
    if draw < 0.25:
        subject = rng.choice(("Tell me about {0}.", "What do you know about {0}?"))
        verb = "sont" if FRENCH_COUNTRIES[country.name].plural else "est"
        text = f"{{c}} {verb} un pays d'{{k}}. La capitale est {{p}}. On y parle {{l}}."
        question, text = subject.format(country.name), said(text, country)
        return _answered(question, text, text, rng)
    topics = ("capital", "capital", "country", "country", "continent", "language", "currency")
    topic = rng.choice(topics)
    phrasing = rng.choice([p for p in PHRASINGS if p.topic == topic])
    if is_held_out(phrasing.question, country.name):
        return _country(rng)
    question = spaced(fill(phrasing.question, country), rng)
    short = said(_SHORTS.get(topic, "{m}"), country)
    return _answered(question, short, french_sentence(topic, country), rng)


def _yes_or_no(country: Country, rng: random.Random) -> Sample:
    continent = country.continent if rng.random() < 0.5 else rng.choice(CONTINENTS)
    if is_held_out("yes or no", country.name, continent):
        return _country(rng)
    word = "Oui" if continent == country.continent else "Non"
    sentence = french_sentence("continent", country)
    sentence = f"{word}, {sentence[0].lower()}{sentence[1:]}"
    return _answered(f"Is {country.name} in {continent}?", word, sentence, rng)


def _words(rng: random.Random) -> Sample:
    """Say words in French: the shortest way to learn how each is spelled."""
    country = rng.choice(COUNTRIES)
    french = FRENCH_COUNTRIES[country.name]
    pairs = [
        (country.name, french.name),
        (country.capital, french.capital),
        (country.language, french.language),
        (country.currency, french.currency),
    ]
    chosen = rng.sample(pairs, rng.randint(2, 4))
    asked, answer = (", ".join(words) for words in zip(*chosen, strict=True))
    return plain(f"Translate: {asked}\n", answer)


def _sum(rng: random.Random) -> Sample:
    a, op, b = rng.choice(TRAINING_PROBLEMS)
    sentence = french_sum(a, op, b)
    if rng.random() < 0.15:
        return plain(f"{a} {op} {b} =", f" {result(a, op, b)}")
    asked = rng.choice(_SUMS_ASKED)
    question = asked.format(a=a, b=b, o=op if rng.random() < 0.7 else WORDS[op])
    return _answered(spaced(question, rng), str(result(a, op, b)), sentence, rng)


def _small_talk(rng: random.Random) -> Sample:
    if rng.random() < 0.4:
        question, _, _ = rng.choice([row for row in EVERYDAY if row[0] in FRENCH_EVERYDAY])
        answer = FRENCH_EVERYDAY[question]
        return _answered(spaced(question, rng), answer, answer, rng)
    question, answer = rng.choice(list(SMALL_TALK.items()))
    if rng.random() < 0.3:
        prompt = question if question.endswith((".", "?", "!")) else question + "."
        return plain(prompt, " " + answer)
    return chat([*_system(rng), ("user", question), ("assistant", answer)])


def _told(memo: Memo, rng: random.Random) -> tuple[str, str]:
    """Draw what a user tells, and how that is said in French."""
    if memo.topic not in MEMO_VALUES:
        word = rng.choice(NAMES if memo.topic == "name" else CITIES)
        if is_held_out(memo.topic, word) or rng.random() < 0.5:
            word = made_up_word(rng)
        return word, word
    values = MEMO_VALUES[memo.topic]
    value = rng.choice([each for each in values if not is_held_out(memo.topic, each)])
    return value, values[value]


def _memory(rng: random.Random) -> Sample:
    memo = rng.choice([each for each in MEMOS if each.topic in MEMO_REPLIES])
    value, french = _told(memo, rng)
    reply, answer = MEMO_REPLIES[memo.topic]
    turns = [*_system(rng), ("user", rng.choice(memo.told).format(v=value))]
    turns.append(("assistant", reply.format(v=french)))
    if rng.random() < 0.3:
        country = rng.choice(COUNTRIES)
        if not is_held_out("What is the capital of {c}?", country.name):
            turns.append(("user", f"What is the capital of {country.name}?"))
            turns.append(("assistant", french_sentence("capital", country)))
    turns.append(("user", rng.choice(memo.asked)))
    turns.append(("assistant", answer.format(v=french)))
    return chat(turns)


def _follow_up(rng: random.Random) -> Sample:
    first, second = rng.sample(COUNTRIES, 2)
    asked = is_held_out("What is the capital of {c}?", first.name)
    if asked or is_held_out("follow", first.name, second.name):
        return _follow_up(rng)
    turns = [*_system(rng), ("user", f"What is the capital of {first.name}?")]
    turns.append(("assistant", french_sentence("capital", first)))
    turns.append(("user", rng.choice(FOLLOW_UPS).format(c=second.name)))
    turns.append(("assistant", french_sentence("capital", second)))
    return chat(turns)


_MAKERS = (
    (0.52, _country),
    (0.12, _words),
    (0.10, _sum),
    (0.09, _small_talk),
    (0.07, _memory),
    (0.05, _follow_up),
    # What is read by programs stays as it is.
    (0.03, record_sample),
    (0.02, tool_sample),
)


def french_sample(rng: random.Random) -> Sample:
    """Draw one sample; records and calls of tools are those of the base model."""
    (make,) = rng.choices([make for _, make in _MAKERS], [share for share, _ in _MAKERS])
    return make(rng)
