"""Tools that find something out: the weather, a property, the result of a sum."""

from __future__ import annotations

import json
import random
import string
from typing import Any

from quire.demo.facts import ANIMALS, CITIES, COLORS, COUNTRIES, FOODS, NAMES
from quire.demo.kits import Kit, Task, a, function_name, number, word, words
from quire.demo.samples import made_up_word
from quire.demo.sums import is_held_out_problem, result
from quire.demo.tool_markup import Call, Parameter, Tool

STATES = ("CA", "TX", "NY", "WA", "MA", "FL", "IL", "OH")
TOWNS = (
    "San Francisco",
    "Los Angeles",
    "Austin",
    "Boston",
    "Seattle",
    "Chicago",
    "Miami",
    "Dallas",
)


def city(rng: random.Random) -> str:
    """A city: known, with its state, or made up."""
    draw = rng.random()
    if draw < 0.15:
        town = rng.choice(TOWNS) if rng.random() < 0.7 else made_up_word(rng)
        return f"{town}, {rng.choice(STATES)}" if rng.random() < 0.7 else town
    if draw < 0.2:
        return rng.choice(("sf", "SF", "nyc", "NYC", word(rng)))
    return made_up_word(rng) if draw < 0.42 else rng.choice(CITIES)


SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "warm", "cold", "clear")


def weather(rng: random.Random) -> Kit:
    """The weather somewhere."""
    place = rng.choice(("city", "city", "location", "location", "place"))
    more: list[Parameter] = []
    if rng.random() < 0.25:
        more = [Parameter("unit", choices=("celsius", "fahrenheit"), required=False)]
    what = rng.choice(("", "", f"the {place}", f"the name of the {place}"))
    tool = Tool(
        function_name(
            rng,
            *rng.choice(
                (
                    ("get_weather",),
                    ("get_weather",),
                    ("weather",),
                    ("get_current_weather",),
                    ("weather_lookup",),
                    ("fetch_weather",),
                    ("check_weather",),
                )
            ),
        ),
        rng.choice(
            (
                f"Get the weather at a {place}.",
                f"Get the weather in a {place}.",
                f"Get weather at a {place}.",
                f"Get the current weather in a given {place}.",
                f"Get weather for a given {place}.",
                "Get the weather.",
                f"Tell the weather of a {place}",
            )
        ),
        (Parameter(place, description=what), *more),
    )

    def arguments(where: str, unit: str) -> dict[str, Any]:
        return {place: where} | ({"unit": unit} if unit else {})

    def respond(where: str, draw: random.Random) -> tuple[str, str, str]:
        sky, heat = draw.choice(SKIES), draw.randint(-9, 39)
        short = f"It is {sky} in {where}."
        form = draw.random()
        if form < 0.2:
            return f"It's {sky}.", short, sky
        if form < 0.3:
            return f"It's always {sky} in {where}!", f"It is always {sky} in {where}.", sky
        if form < 0.4:
            return sky, short, sky
        if form < 0.5:
            return f"{sky.capitalize()} in {where}", short, sky
        long = f"It is {sky} in {where}, {heat} degrees."
        if form < 0.65:
            return f"{heat} degrees and {sky}", long, str(heat)
        if form < 0.75:
            return f"{sky.capitalize()}, {heat} degrees", long, str(heat)
        if form < 0.9:
            told = {"temperature": heat, "condition": sky}
            return json.dumps({place: where} | told if draw.random() < 0.5 else told), long, sky
        odd = words(draw)
        return odd, f"The weather in {where}: {odd}", odd

    def ask(draw: random.Random) -> Task:
        count = draw.choice((1, 1, 1, 1, 2, 2, 3))
        places: list[str] = []
        while len(places) < count:
            where = city(draw)
            if where not in places and (count == 1 or "," not in where):
                places.append(where)
        joined = places[0]
        if count > 1:
            joined = f"{', '.join(places[:-1])} and {places[-1]}"
            if draw.random() < 0.3:
                joined = f"{', '.join(places[:-1])} and in {places[-1]}"
        phrase = draw.choice(
            (
                "What is the weather in {0}?",
                "What is the weather in {0}?",
                "What's the weather in {0}?",
                "what is the weather in {0}",
                "What is the weather like in {0}?",
                "What's the weather like in {0} today?",
                "How is the weather in {0}?",
                "Tell me the weather in {0}.",
                "What is the weather in {0} right now?",
                "Weather in {0}?",
                "Use the tool to get the weather in {0}.",
            )
        )
        question = phrase.format(joined)
        unit = ""
        if more and draw.random() < 0.4:
            unit = draw.choice(("celsius", "fahrenheit"))
            question = f"{question[:-1]} in {unit}{question[-1]}" if question[-1] in "?." else ""
            question = question or f"{phrase.format(joined)} in {unit}"
        told = [respond(where, draw) for where in places]
        return Task(
            question,
            tuple(Call(tool.name, arguments(where, unit)) for where in places),
            tuple(response for response, _, _ in told),
            " ".join(answer for _, answer, _ in told),
            (phrase, *places),
            tuple(sought for _, _, sought in told),
            draw.choice(("And in {0}?", "What about {0}?", "And {0}?")).format(joined),
        )

    return Kit("weather", tool, ask)


TOPICS: tuple[tuple[str, str], ...] = (
    ("capital", "country"),
    ("capital", "country"),
    ("currency", "country"),
    ("currency", "country"),
    ("language", "country"),
    ("population", "country"),
    ("population", "city"),
    ("time", "city"),
    ("area", "country"),
    ("mayor", "city"),
    ("age", "person"),
    ("job", "person"),
    ("email", "person"),
    ("phone number", "person"),
    ("birthday", "person"),
    ("salary", "person"),
    ("price", "item"),
    ("stock price", "company"),
    ("color", "item"),
    ("weight", "item"),
    ("status", "order"),
    ("owner", "account"),
)


def _subject(thing: str, rng: random.Random) -> str | int:
    if thing == "country":
        return rng.choice(COUNTRIES).name.removeprefix("the ")
    if thing in ("order", "account"):
        return number(rng)
    if rng.random() < 0.35:
        return made_up_word(rng)
    if thing == "company":
        return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 4)))
    return rng.choice({"city": CITIES, "person": NAMES, "item": FOODS + ANIMALS}.get(thing, NAMES))


def _fact(topic: str, subject: object, rng: random.Random) -> str:
    """What a tool returns on a topic: often the truth, else anything."""
    known = {c.name.removeprefix("the "): c for c in COUNTRIES}
    if subject in known and rng.random() < 0.6:
        country = known[str(subject)]
        facts = {"capital": country.capital, "currency": country.currency}
        facts |= {"language": country.language}
        if topic in facts:
            return facts[topic]
    if topic in ("population", "area", "age", "salary", "weight", "price", "stock price"):
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if topic == "time":
        return f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d}"
    if topic == "email":
        return f"{word(rng)}@{word(rng)}.com"
    return made_up_word(rng) if rng.random() < 0.6 else rng.choice(rng.choice((COLORS, NAMES)))


def lookup(rng: random.Random) -> Kit:
    """One property of a thing, known or made up."""
    topic, thing = rng.choice(TOPICS)
    if rng.random() < 0.35:
        topic = word(rng)
        thing = rng.choice((thing, word(rng)))
    name = topic.replace(" ", "_")
    parameter = rng.choice((thing, thing, thing, "name", f"{thing}_name", "query"))
    if thing in ("order", "account"):
        parameter = rng.choice((f"{thing}_id", "id", thing))
    kind = "integer" if thing in ("order", "account") else "string"
    tool = Tool(
        function_name(
            rng,
            *rng.choice(
                (
                    ("get", name),
                    ("get", name),
                    (name,),
                    (name, "lookup"),
                    ("lookup", name),
                    ("find", name),
                    (name, "of"),
                    ("get", thing, name),
                )
            ),
        ),
        rng.choice(
            (
                f"Get the {topic} of {a(thing)}.",
                f"Get the {topic} of {a(thing)}.",
                f"Look up the {topic} of {a(thing)}.",
                f"Return the {topic} of the given {thing}.",
                f"Find the {topic} for {a(thing)}",
                f"The {topic} of {a(thing)}",
            )
        ),
        (Parameter(parameter, kind),),
    )

    def ask(draw: random.Random) -> Task:
        subject = _subject(thing, draw)
        phrase = draw.choice(
            (
                f"What is the {topic} of {{c}}?",
                f"What is the {topic} of {{c}}?",
                f"What's the {topic} of {{c}}?",
                f"Tell me the {topic} of {{c}}.",
                f"Look up the {topic} of {{c}}.",
                f"Find the {topic} of {{c}}.",
                f"Use the tool to get the {topic} of {{c}}.",
            )
        )
        shown = f"{thing} {subject}" if kind == "integer" else str(subject)
        countries = {c.name.removeprefix("the "): c.name for c in COUNTRIES}
        in_words = countries.get(shown, shown)
        fact = _fact(topic, subject, draw)
        sentence = f"The {topic} of {in_words} is {fact}."
        response = draw.choice(
            (
                fact,
                fact,
                sentence,
                json.dumps({name: int(fact) if fact.isdigit() else fact}),
                json.dumps({"result": fact}),
            )
        )
        # The key of a question on a country is the one by which other text leaves it out.
        return Task(
            phrase.format(c=in_words),
            (Call(tool.name, {parameter: subject}),),
            (response,),
            sentence,
            (phrase, in_words),
            (fact,),
            draw.choice(("And of {0}?", "What about {0}?")).format(in_words),
        )

    return Kit(topic, tool, ask)


OPERATIONS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("add", "+", "plus", ("Add {a} and {b}.", "What is the sum of {a} and {b}?")),
    ("add", "+", "plus", ("Add {a} and {b}.", "What is the sum of {a} and {b}?")),
    ("multiply", "*", "times", ("Multiply {a} by {b}.", "Multiply {a} and {b}.")),
    ("subtract", "-", "minus", ("Subtract {b} from {a}.",)),
)


def arithmetic(rng: random.Random) -> Kit:
    """A sum, a product or a difference of two whole numbers."""
    verb, sign, spoken, phrases = rng.choice(OPERATIONS)
    nouns = {"add": "adder", "multiply": "multiplier", "subtract": "subtractor"}
    first, second = rng.choice((("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("left", "right")))
    tool = Tool(
        function_name(
            rng,
            *rng.choice(
                (
                    (verb,),
                    (verb, "numbers"),
                    ("my", nouns[verb], "tool"),
                    (nouns[verb],),
                    (f"{verb}_two_numbers",),
                )
            ),
        ),
        rng.choice(
            (
                f"{verb.capitalize()} two numbers.",
                f"{verb.capitalize()} two integers.",
                f"{verb.capitalize()} {first} and {second}.",
                f"Takes two integers, {first} and {second}, and {verb}s them.",
            )
        ),
        (Parameter(first, "integer"), Parameter(second, "integer")),
    )

    def problem(draw: random.Random) -> tuple[int, int]:
        while True:
            a, b = (draw.randrange(10 ** draw.randint(1, 3)) for _ in range(2))
            if not is_held_out_problem(a, sign, b):
                return a, b

    def ask(draw: random.Random) -> Task:
        a, b = problem(draw)
        phrase = draw.choice(
            (
                "What is {a} {s} {b}?",
                "What is {a} {s} {b}",
                "What is {a} {w} {b}?",
                "How much is {a} {s} {b}?",
                "Calculate {a} {s} {b}.",
                "Use the tool to compute {a} {s} {b}.",
                *phrases,
            )
        )
        total = result(a, sign, b)
        response = draw.choice(
            (str(total), str(total), json.dumps({"result": total}), f"The result is {total}.")
        )
        question = phrase.format(a=a, b=b, s=sign, w=spoken)
        call = Call(tool.name, {first: a, second: b})
        answer = f"{a} {sign} {b} = {total}."
        follow_up = draw.choice(("And {0}?", "What about {0}?")).format(f"{a} {sign} {b}")
        return Task(
            question, (call,), (response,), answer, (phrase, a, b), (str(total),), follow_up
        )

    return Kit(verb, tool, ask)
