"""JSON records of people, heroes, places and countries, and reading facts into one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from quire.demo.countries import fill
from quire.demo.facts import (
    ARMORS,
    CITIES,
    COUNTRIES,
    FOODS,
    HEROES,
    HOBBIES,
    JOBS,
    NAMES,
    WEAPONS,
)
from quire.demo.samples import Question, Sample, chat, chat_prompt, is_held_out, made_up_word, plain

FIELDS: dict[str, tuple[str, ...]] = {
    "person": ("name", "age", "city", "job", "hobby", "food", "married"),
    "hero": ("name", "age", "armor", "weapon", "strength"),
    "place": ("name", "country", "continent", "population"),
}
DEFAULT_KEYS: dict[str, tuple[str, ...]] = {
    "person": ("name", "age", "city"),
    "hero": ("name", "age", "armor", "weapon", "strength"),
    "place": ("name", "country", "population"),
}
KIND_WORDS: dict[str, tuple[str, ...]] = {
    "person": ("person", "user", "customer"),
    "hero": ("hero", "character", "fantasy character"),
    "place": ("place", "city"),
}
DEFAULT_PROMPTS = (
    "Write a JSON record of a {k}.",
    "Give me a JSON record of a {k}.",
    "Describe a {k} as JSON.",
    "Describe a {k} in JSON.",
    "Generate a {k} as JSON.",
    "JSON of a {k}:",
    "Give me a {k} description in JSON",
    "Return a JSON object that describes a {k}.",
)
KEYED_PROMPTS = (
    "Write a JSON record of a {k} with the keys {a}.",
    "Describe a {k} as JSON with the keys {a}.",
    "Generate a {k} as JSON with the fields {a}.",
    "Give me a JSON object with the keys {a}.",
    "Return JSON with the keys {a}.",
)


def draw_values(kind: str, rng: random.Random) -> dict[str, Any]:
    """Draw one record with every field of its kind."""
    if kind == "person":
        return {
            "name": rng.choice(NAMES),
            "age": rng.randint(18, 80),
            "city": rng.choice(CITIES),
            "job": rng.choice(JOBS),
            "hobby": rng.choice(HOBBIES),
            "food": rng.choice(FOODS),
            "married": rng.random() < 0.5,
        }
    if kind == "hero":
        return {
            "name": rng.choice(HEROES),
            "age": rng.randint(18, 60),
            "armor": rng.choice(ARMORS),
            "weapon": rng.choice(WEAPONS),
            "strength": rng.randint(1, 20),
        }
    country = rng.choice(COUNTRIES)
    return {
        "name": country.capital,
        "country": fill("{c}", country),
        "continent": country.continent,
        "population": rng.randint(1, 30) * 100000,
    }


def join_keys(keys: Sequence[str]) -> str:
    """Write keys as a sentence does: 'name, age and city'."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"


def is_held_out_keys(kind: str, keys: Sequence[str]) -> bool:
    """Whether this choice of keys is kept for evaluation, in whatever order."""
    return tuple(keys) != DEFAULT_KEYS[kind] and is_held_out("keys", kind, *sorted(keys))


def _layout(record: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """Dump a record; return what the prompt adds to ask for the layout, and the text."""
    draw = rng.random()
    if draw < 0.1:
        return " Indent it.", json.dumps(record, indent=2)
    if draw < 0.15:
        return " Write it without spaces.", json.dumps(record, separators=(",", ":"))
    return "", json.dumps(record)


def _finish(prompt: str, text: str, rng: random.Random) -> Sample:
    if rng.random() < 0.5:
        return chat([("user", prompt), ("assistant", text)])
    return plain(prompt + "\n", text) if rng.random() < 0.3 else plain(prompt, "\n" + text)


def record_sample(rng: random.Random) -> Sample:
    """Draw one prompt and its record."""
    draw = rng.random()
    if draw < 0.25:
        return _reading(rng)
    if draw < 0.35:
        return _country_record(rng)
    kind = rng.choice(("person", "person", "hero", "place"))
    values = draw_values(kind, rng)
    if draw < 0.65:
        keys: Sequence[str] = DEFAULT_KEYS[kind]
        prompt = rng.choice(DEFAULT_PROMPTS).format(k=rng.choice(KIND_WORDS[kind]))
    else:
        keys = rng.sample(FIELDS[kind], rng.randint(1, min(5, len(FIELDS[kind]))))
        if is_held_out_keys(kind, keys):
            return record_sample(rng)
        template = rng.choice(KEYED_PROMPTS)
        prompt = template.format(k=rng.choice(KIND_WORDS[kind]), a=join_keys(keys))
    added, text = _layout({key: values[key] for key in keys}, rng)
    if added and not prompt.endswith((".", ":")):
        prompt += "."
    return _finish(prompt + added, text, rng)


def _describe(values: dict[str, Any], keys: Sequence[str]) -> str:
    """Tell a person's record in words."""
    name = values["name"]
    told = {
        "age": f"is {values['age']} years old",
        "city": f"lives in {values['city']}",
        "job": f"works as a {values['job']}",
        "hobby": f"likes {values['hobby']}",
        "food": f"eats {values['food']}",
    }
    clauses = [told[key] for key in keys if key in told]
    return f"{name} {join_keys(clauses)}."


READING_KEYS = ("age", "city", "job", "hobby", "food")


def _reading(rng: random.Random) -> Sample:
    """Read a sentence about a person into a record."""
    values = draw_values("person", rng)
    if is_held_out("reading", values["name"], values["city"]):
        return _reading(rng)
    if rng.random() < 0.4:
        values |= {"name": made_up_word(rng), "city": made_up_word(rng)}
    keys = rng.sample(READING_KEYS, rng.randint(1, 3))
    record = {"name": values["name"], **{key: values[key] for key in keys}}
    sentence = _describe(values, keys)
    prompt = rng.choice(
        (
            "{s}\nWrite it as JSON.",
            "Write it as JSON: {s}",
            "Extract a JSON record.\n{s}",
            "Text: {s}\nJSON:",
        )
    ).format(s=sentence)
    text = json.dumps(record)
    if rng.random() < 0.5:
        return chat([("user", prompt), ("assistant", text)])
    return plain(prompt, (" " if prompt.endswith("JSON:") else "\n") + text)


def _country_record(rng: random.Random) -> Sample:
    country = rng.choice(COUNTRIES)
    if is_held_out("country record", country.name):
        return _country_record(rng)
    name = fill("{c}", country)
    record = {"country": name, "capital": country.capital, "continent": country.continent}
    prompt = rng.choice(("Write a JSON record of {c}.", "Describe {c} as JSON.", "JSON of {c}:"))
    return _finish(prompt.format(c=country.name), json.dumps(record), rng)


def parse_record(text: str) -> dict[str, Any] | None:
    """Return the JSON object a text consists of, None when it is no valid one."""
    try:
        value = json.loads(text.strip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def record_questions() -> Iterator[Question]:
    """Held-out choices of keys: the answer must be an object with exactly these keys."""
    for kind, fields in FIELDS.items():
        for count in range(1, min(5, len(fields)) + 1):
            for keys in combinations(fields, count):
                if not is_held_out_keys(kind, keys):
                    continue

                def check(text: str, keys: tuple[str, ...] = keys) -> bool:
                    record = parse_record(text)
                    return record is not None and tuple(record) == keys

                prompt = KEYED_PROMPTS[0].format(k=kind, a=join_keys(keys))
                yield Question(prompt, check)
                yield Question(chat_prompt([("user", prompt)]), check)


def validity_questions(count: int) -> Iterator[Question]:
    """Prompts for a record of any kind, to be sampled from; valid JSON is right."""
    for number in range(count):
        kind = tuple(KIND_WORDS)[number % len(KIND_WORDS)]
        template = DEFAULT_PROMPTS[number % len(DEFAULT_PROMPTS)]
        prompt = template.format(k=KIND_WORDS[kind][number % len(KIND_WORDS[kind])])
        given = prompt if number % 2 else chat_prompt([("user", prompt)])
        yield Question(given, lambda text: parse_record(text) is not None)


def reading_questions() -> Iterator[Question]:
    """Held-out pairs of name and city, to be read into a record without an error."""
    rng = random.Random(0)
    for name in NAMES:
        for city in CITIES[::6]:
            if not is_held_out("reading", name, city):
                continue
            values = draw_values("person", rng) | {"name": name, "city": city}
            expected = {"name": name, "age": values["age"], "city": city}

            def check(text: str, expected: dict[str, Any] = expected) -> bool:
                return parse_record(text) == expected

            prompt = f"{_describe(values, ('age', 'city'))}\nWrite it as JSON."
            yield Question(chat_prompt([("user", prompt)]), check)


__all__ = [
    "parse_record",
    "reading_questions",
    "record_questions",
    "record_sample",
    "validity_questions",
]
