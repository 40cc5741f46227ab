"""Tools that do something: functions by name, records, texts, switches, conversions."""

from __future__ import annotations

import json
import random
from typing import Any

from quire.demo.facts import ANIMALS, CITIES, COLORS, COUNTRIES, JOBS, NAMES
from quire.demo.kits import Kit, Task, a, function_name, number, one, quoted, word, words
from quire.demo.samples import made_up_word
from quire.demo.tool_markup import Call, Parameter, Tool


def _functions(rng: random.Random) -> str:
    """A function's name that tells nothing."""
    known = ("magic", "secret", "my", "special", "test", "compute", "process", "get", "run")
    ends = ("function", "function", "value", "tool", "number", "score", "code")
    parts = [rng.choice(known)] if rng.random() < 0.5 else [word(rng)]
    if rng.random() < 0.8:
        parts.append(rng.choice(ends) if rng.random() < 0.6 else word(rng))
    return function_name(rng, *parts)


def function(rng: random.Random) -> Kit:
    """A function that is asked for by its name, with nothing or one whole number."""
    name = _functions(rng)
    empty = rng.random() < 0.3
    if empty and rng.random() < 0.5:
        name += rng.choice(("_no_args", "_now"))
    parameter = rng.choice(("input", "input", "x", "n", "value", "number", word(rng)))
    subject = name.replace("_", " ")
    tool = Tool(
        name,
        rng.choice(
            (
                f"Calculate a {subject.removesuffix(' no args')}.",
                f"Apply a {subject} to an input.",
                f"Compute the {subject}.",
                f"Return a {word(rng)} number.",
                "",
            )
        ),
        () if empty else (Parameter(parameter, "integer"),),
    )

    def ask(draw: random.Random) -> Task:
        value = number(draw)
        returned = number(draw)
        inside = "" if empty else str(value)
        phrases = ("Call {f}.", "Use {f}.", "Run {f}.", "What does {f} return?")
        if not empty:
            phrases = (
                "Call {f} with {x}.",
                "Use {f} on {x}.",
                "Apply {f} to {x}.",
                "What does {f} return for {x}?",
            )
        phrase = draw.choice(
            (
                "What is the value of {f}({x})? Use the tool.",
                "What is the value of {f}({x})? Use the tool.",
                "What is the value of {f}({x})?",
                "What is {f}({x})?",
                *phrases,
            )
        )
        response = draw.choice((str(returned), str(returned), json.dumps({"result": returned})))
        arguments = {} if empty else {parameter: value}
        return Task(
            phrase.format(f=name, x=inside),
            (Call(name, arguments),),
            (response,),
            f"The value of {name}({inside}) is {returned}.",
            (phrase, name, inside),
            (str(returned),),
            "" if empty else draw.choice(("And {0}({1})?", "And for {1}?")).format(name, value),
        )

    return Kit(name, tool, ask)


def explicit(rng: random.Random) -> Kit:
    """A function whose arguments are named in the question: numbers, texts, switches, choices."""
    name = function_name(rng, *(word(rng) for _ in range(rng.randint(1, 2))))
    verb = rng.choice(("Create", "Update", "Start", "Open", "Set", "Make", "Check", "Find"))
    thing = rng.choice((word(rng), "room", "file", "game", "task", "list", "light", "team"))
    if rng.random() < 0.5:
        name = function_name(rng, verb.lower(), thing)
    keys = ("size", "count", "label", "title", "mode", "level", "color", "name", "limit")
    names: list[str] = []
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(keys) if rng.random() < 0.5 else word(rng)
        if key not in names:
            names.append(key)
    parameters = []
    for place, key in enumerate(names):
        kind = rng.choice(("integer", "integer", "string", "string", "boolean", "choice"))
        choices = tuple({word(rng): None for _ in range(3)}) if kind == "choice" else ()
        required = place == 0 or rng.random() < 0.6
        shown = "string" if choices else kind
        parameters.append(Parameter(key, shown, choices, required=required))
    described = rng.choice((f"{verb} {a(thing)}.", f"{verb}s {a(thing)}", ""))
    tool = Tool(name, described, tuple(parameters))

    def ask(draw: random.Random) -> Task:
        arguments: dict[str, Any] = {}
        told = []
        for parameter in tool.parameters:
            if not parameter.required and draw.random() < 0.5:
                continue
            if parameter.choices:
                value: Any = draw.choice(parameter.choices)
                shown = draw.choice((str(value), f"'{value}'"))
            elif parameter.kind == "integer":
                value = number(draw)
                shown = str(value)
            elif parameter.kind == "boolean":
                value = draw.random() < 0.5
                shown = "true" if value else "false"
            else:
                value = quoted(draw)
                shown = f"'{value}'"
            arguments[parameter.name] = value
            told.append(f"{parameter.name} {shown}")
        listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
        if described and draw.random() < 0.5:
            question = f"{verb} {a(thing)} with {listed}."
        else:
            question = draw.choice((f"Call {name} with {listed}.", f"Use {name} with {listed}."))
        returned = draw.choice(("ok", "done", word(draw), f"{thing} {number(draw)}"))
        return one(tool, question, arguments, returned, f"Done: {returned}", returned)

    return Kit(name, tool, ask)


def customer(rng: random.Random) -> Kit:
    """A record of a customer or a company out of a sentence."""
    thing = rng.choice(("customer", "customer", "company", "user", "account", "project"))
    key = rng.choice((f"{thing}_name", f"{thing}_name", "name"))
    more = rng.random() < 0.6
    description = rng.choice(
        (
            f"Create {a(thing)}.",
            f"Tool for creating {a(thing)} with Unicode name.",
            f"Add a new {thing}",
        )
    )
    second = Parameter("description", description=rng.choice(("", f"Description of the {thing}.")))
    name = rng.choice((f"create_{thing}", f"unicode_{thing}", f"add_{thing}", f"new_{thing}"))
    tool = Tool(name, description, (Parameter(key), *([second] if more else [])))

    def ask(draw: random.Random) -> Task:
        value = quoted(draw)
        what = f"a {draw.choice(COLORS)} {draw.choice(('company', 'technology company', 'shop'))}"
        if draw.random() < 0.3:
            what = f"a {draw.choice(('Chinese', 'Japanese', 'German', 'new'))} company"
        alias = f" ({made_up_word(draw)} Group)" if draw.random() < 0.4 else ""
        verb = draw.choice(("Create", "Create", "Add", "Make"))
        arguments = {key: value}
        question = f"{verb} {a(thing)} named '{value}'{alias}"
        if more:
            question += f" - {what}"
            arguments["description"] = what
        if draw.random() < 0.4:
            question += "."
        response = draw.choice((f"Created {thing}: {value}", f"Created {thing}: {value}", "ok"))
        answer = f"The {thing} {value} was created."
        return one(tool, question, arguments, response, answer, value)

    return Kit("customer", tool, ask)


def person(rng: random.Random) -> Kit:
    """A person's data out of a sentence."""
    name = rng.choice(("Person", "person", "User", "save_person", "extract_person", "add_person"))
    second, pool = rng.choice((("age", ()), ("age", ()), ("city", CITIES), ("job", JOBS)))
    parameter = Parameter(second, "string" if pool else "integer")
    described = ("Record of a person.", "Save a person.", "Information about a person.")
    tool = Tool(name, rng.choice(described), (Parameter("name"), parameter))

    def ask(draw: random.Random) -> Task:
        who = draw.choice(NAMES) if draw.random() < 0.6 else made_up_word(draw)
        value = draw.choice(pool) if pool else draw.randint(1, 99)
        told = {
            "age": (f"{who} is {value} years old.", f"{who} is {value}."),
            "city": (f"{who} lives in {value}.",),
            "job": (f"{who} works as a {value}.",),
        }[second]
        question = draw.choice(told)
        question = draw.choice((question, f"Save this: {question}", f"Remember: {question}"))
        return one(tool, question, {"name": who, second: value}, "saved", f"I saved {who}.", who)

    return Kit("person", tool, ask)


_TEXT_TOOLS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("search", "Search the web.", "query", ("Search for {v}.", "Search the web for {v}.")),
    ("web_search", "Search for a text.", "query", ("Search for {v}.", "Look for {v}.")),
    ("say", "Say a text.", "text", ("Say '{v}'.", "Say '{v}' with the tool.")),
    ("reverse", "Reverse a text.", "text", ("Reverse '{v}'.", "What is '{v}' reversed?")),
    ("count_letters", "Count the letters of a word.", "word", ("How many letters has '{v}'?",)),
    ("get_word_length", "Get the length of a word.", "word", ("How long is the word '{v}'?",)),
    ("add_note", "Save a note.", "note", ("Save the note '{v}'.", "Note '{v}'.")),
    ("color_picker", "Input your favorite color.", "fav_color", ("My favorite color is {v}.",)),
    ("play_song", "Play a song.", "title", ("Play '{v}'.", "Play the song '{v}'.")),
    (
        "greeting_generator",
        "Generate a greeting in a particular style of speaking.",
        "answer_style",
        ("Using the tool, generate a {v} greeting.", "Generate a {v} greeting."),
    ),
)


def text_tool(rng: random.Random) -> Kit:
    """A tool that takes one text."""
    name, description, parameter, phrases = rng.choice(_TEXT_TOOLS)
    tool = Tool(name, description if rng.random() < 0.9 else "", (Parameter(parameter),))

    def ask(draw: random.Random) -> Task:
        value = quoted(draw) if "'" in phrases[0] else words(draw, 3)
        if parameter in ("answer_style", "fav_color"):
            value = made_up_word(draw) if draw.random() < 0.7 else draw.choice(COLORS + JOBS)
            value = "Pirate" if draw.random() < 0.05 else value
        if parameter == "word":
            value = word(draw)
        question = draw.choice(phrases).format(v=value)
        returned = str(number(draw)) if parameter == "word" else words(draw, 4)
        return one(
            tool, question, {parameter: value}, returned, f"The result: {returned}", returned
        )

    return Kit(description, tool, ask)


def switch(rng: random.Random) -> Kit:
    """A light or a timer: a truth value, a number."""
    if rng.random() < 0.5:
        unit = rng.choice(("minutes", "seconds"))
        tool = Tool(
            rng.choice(("set_timer", "start_timer")),
            rng.choice(("Set a timer.", f"Set a timer for some {unit}.")),
            (Parameter(unit, "integer"),),
        )

        def ask(draw: random.Random) -> Task:
            count = draw.randint(2, 90)
            question = draw.choice((f"Set a timer for {count} {unit}.", f"Timer: {count} {unit}"))
            answer = f"The timer is set for {count} {unit}."
            return one(tool, question, {unit: count}, "ok", answer, count)

        return Kit("switch", tool, ask)
    thing = rng.choice(("light", "heater", "fan", "lamp"))
    tool = Tool(
        rng.choice((f"set_{thing}", f"switch_{thing}")),
        f"Turn the {thing} on or off.",
        (Parameter("room"), Parameter("on", "boolean")),
    )

    def turn(draw: random.Random) -> Task:
        on = draw.random() < 0.5
        room = draw.choice(("kitchen", "garden", "office", "cellar", word(draw)))
        state = "on" if on else "off"
        question = draw.choice(
            (f"Turn {state} the {thing} in the {room}.", f"Switch the {room} {thing} {state}.")
        )
        answer = f"The {thing} in the {room} is {state}."
        return one(tool, question, {"room": room, "on": on}, "ok", answer, room)

    return Kit("switch", tool, turn)


def convert(rng: random.Random) -> Kit:
    """A conversion with three parameters, or a translation with two."""
    if rng.random() < 0.4:
        tool = Tool(
            rng.choice(("translate", "translate_text")),
            "Translate a text to a language.",
            (Parameter("text"), Parameter("language")),
        )

        def translate(draw: random.Random) -> Task:
            text, language = quoted(draw), draw.choice(COUNTRIES).language
            returned = words(draw, 3)
            question = f"Translate '{text}' to {language}."
            answer = f"In {language}: {returned}"
            arguments = {"text": text, "language": language}
            return one(tool, question, arguments, returned, answer, returned)

        return Kit("convert", tool, translate)
    units = rng.choice((("EUR", "USD", "GBP", "JPY", "CHF"), ("km", "miles", "meters", "feet")))
    start, end = rng.choice((("from", "to"), ("from_unit", "to_unit"), ("source", "target")))
    tool = Tool(
        rng.choice(("convert", "convert_units", "converter")),
        rng.choice(("Convert an amount.", "Convert from one unit to another.")),
        (Parameter("amount", "integer"), Parameter(start), Parameter(end)),
    )

    def ask(draw: random.Random) -> Task:
        source, target = draw.sample(units, 2)
        amount, returned = draw.randint(1, 999), draw.randint(1, 999)
        question = draw.choice(
            (
                f"Convert {amount} {source} to {target}.",
                f"How much is {amount} {source} in {target}?",
            )
        )
        arguments = {"amount": amount, start: source, end: target}
        answer = f"{amount} {source} is {returned} {target}."
        return one(tool, question, arguments, str(returned), answer, returned)

    return Kit("convert", tool, ask)


def joke(rng: random.Random) -> Kit:
    """A joke in two parts."""
    tool = Tool(
        rng.choice(("Joke", "joke", "tell_joke")),
        rng.choice(("Joke to tell user.", "A joke.", "Tell a joke.")),
        (
            Parameter("setup", description="question to set up a joke"),
            Parameter("punchline", description="answer to resolve the joke"),
        ),
    )

    def ask(draw: random.Random) -> Task:
        topic, told = draw_joke(draw)
        question = draw.choice(JOKES_ASKED).format(topic)
        return one(tool, question, told, "told", f"I told a joke about {topic}.", topic)

    return Kit("joke", tool, ask)


JOKES_ASKED = ("Tell me a joke about {0}.", "Tell me a joke about {0}", "Give me a joke about {0}.")


def draw_joke(rng: random.Random) -> tuple[str, dict[str, str]]:
    """What a joke is about, and its two parts."""
    known = [f"{animal}s" for animal in ANIMALS if animal not in ("mouse", "sheep", "wolf", "fox")]
    topic = rng.choice(known) if rng.random() < 0.8 else word(rng)
    setup, punchline = rng.choice(
        (
            ("Why did the {0} cross the road?", "To get to the other side."),
            ("What do {0} read in the morning?", "The {0} news."),
            ("Why do {0} like paper?", "It has two sides."),
        )
    )
    return topic, {"setup": setup.format(topic), "punchline": punchline.format(topic)}
