"""What manuals of Outlines 0.x do, line by line, on quire."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import Any

import outlines
import pytest
from pydantic import BaseModel, constr

from quire import LLM, SamplingParams
from quire.integrations.outlines.installation import install, uninstall


class Food(str, Enum):
    pizza = "Pizza"
    pasta = "Pasta"


class Armor(str, Enum):
    leather = "leather"
    plate = "plate"


class Character(BaseModel):
    name: constr(max_length=10)
    age: int
    armor: Armor
    strength: int


SCHEMA = """{
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "level": {"$ref": "#/definitions/Level"}
    },
    "required": ["name", "level"],
    "definitions": {"Level": {"type": "string", "enum": ["low", "high"]}}
}"""

SUMS = """
    ?start: sum
    ?sum: product (("+" | "-") product)*
    ?product: atom (("*" | "/") atom)*
    ?atom: NUMBER
         | "-" atom
         | "(" sum ")"
    NUMBER: /[1-9][0-9]{0,2}/
"""


def add(a: int, b: int) -> int:
    return a + b


def mul(c: float, d: float) -> float:
    return c * d


class Operation(Enum):
    add = partial(add)
    mul = partial(mul)


@pytest.fixture
def model(models_module: Any) -> Iterator[Any]:
    install()
    yield outlines.models.vllm("quire/demo")
    uninstall()


def test_the_order_of_a_first_steps_page(model):
    """Choices, numbers, a regex, an object with a seed: a model, a generator, a prompt."""
    answer = outlines.generate.choice(model, ["Pizza", "Pasta", "Salad"])("I want a ")
    assert answer in ("Pizza", "Pasta", "Salad")
    assert outlines.generate.choice(model, Food)("I want a ") in ("Pizza", "Pasta")

    assert isinstance(outlines.generate.format(model, int)("1 + 2 = ", seed=1), int)
    assert isinstance(outlines.generate.format(model, float)("1 + 2 = ", seed=1), float)
    when = outlines.generate.format(model, datetime.date)("It happened on ", seed=1)
    assert isinstance(when, datetime.date)

    generator = outlines.generate.regex(
        model,
        r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)",
        sampler=outlines.samplers.greedy(),
    )
    assert re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", generator("The address is ", max_tokens=30))

    generator = outlines.generate.json(model, Character)
    first = generator("Describe a hero", seed=789001)
    assert isinstance(first, Character)
    assert isinstance(first.armor, Armor)
    assert generator("Describe a hero", seed=789001) == first


def test_schemas_grammars_and_functions(model):
    """A schema as a string, a grammar with imports, a function, an Enum of functions."""
    person = outlines.generate.json(model, SCHEMA)("Describe a person", seed=1)
    assert set(person) == {"name", "level"}
    assert person["level"] in ("low", "high")

    expression = outlines.generate.cfg(model, SUMS)("4 - 2 as an expression: ", seed=1)
    assert re.fullmatch(r"[0-9+\-*/()]+", expression)
    imported = SUMS[: SUMS.index("    NUMBER:")] + "    %import common.NUMBER\n"
    assert outlines.generate.cfg(model, imported)("4 - 2: ", seed=1)

    result = outlines.generate.json(model, add)("Two numbers: ", seed=1)
    assert isinstance(add(**result), int)
    result = outlines.generate.json(model, Operation)("Two numbers: ", seed=1)
    assert set(result) in ({"a", "b"}, {"c", "d"})


def test_text_is_streamed_stopped_and_sampled(model):
    """max_tokens, stop_at, lists of prompts, samples, beams."""
    from outlines import generate, samplers

    generator = generate.text(model)
    assert generator("Once upon", max_tokens=10)
    assert "." not in generator("Once upon", stop_at=".")
    assert "." not in generator("Once upon", stop_at=[".", "time"], max_tokens=50)
    for token in generator.stream("Once upon", max_tokens=5):
        assert isinstance(token, str)
    assert len(generator(["Once upon", "There was"], max_tokens=3)) == 2

    sampler = samplers.multinomial(3, temperature=0.5, top_p=0.9)
    assert len(generate.text(model, sampler)("Once upon")) == 3
    assert len(generate.text(model, samplers.multinomial(2, top_k=10))(["a", "b"])[1]) == 2
    assert len(generate.text(model, sampler=samplers.beam_search(beams=5))("Once upon")) == 5


def test_the_page_on_vllm(model, llm: LLM):
    """A model of an engine that there is, and the engine's own parameters for a call."""
    model = outlines.models.VLLM(llm)
    params = SamplingParams(n=2, frequency_penalty=1.0, min_tokens=2)
    generator = outlines.generate.text(model)
    answers = generator("A prompt", sampling_params=params, use_tqdm=False)
    assert len(answers) == 2
    assert params == SamplingParams(n=2, frequency_penalty=1.0, min_tokens=2)

    both = outlines.generate.json(model, Character)(
        ["Describe a hero", "Describe a villain"],
        sampling_params=SamplingParams(n=2, temperature=0.8, seed=1),
    )
    assert [[type(one) for one in row] for row in both] == [[Character, Character]] * 2
    assert json.loads(both[0][0].model_dump_json())["armor"] in ("leather", "plate")
