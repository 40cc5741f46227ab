"""The demo model calls tools: its template writes what was trained, and it does what it says."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.demo import model_path
from quire.demo.kits import Kit, Task
from quire.demo.samples import Question, Turn, chat_prompt
from quire.demo.tool_kits import draw_kits
from quire.demo.tool_markup import (
    Call,
    Parameter,
    Tool,
    calls_text,
    parse_calls,
    responses_text,
    tools_text,
)
from quire.demo.tools import tool_sample
from quire.demo.vocabulary import CHAT_TEMPLATE

WEATHER = Tool("get_weather", "Get the weather at a location.", (Parameter("location"),))
MAGIC = Tool(
    "magic_function", "Apply a magic function to an input.", (Parameter("input", "integer"),)
)


@pytest.fixture(scope="module")
def render() -> Any:
    """Render messages, by transformers and by quire alike."""
    from transformers import AutoTokenizer

    from quire.tokenizer.chat_template import render as render_by_quire

    tokenizer = AutoTokenizer.from_pretrained(model_path())

    def rendered(messages: list[dict[str, Any]], tools: list[Tool] | None = None) -> str:
        functions = [tool.function for tool in tools] if tools else None
        text = tokenizer.apply_chat_template(
            messages,
            tools=functions,
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text == render_by_quire(CHAT_TEMPLATE, messages, special_tokens={}, tools=functions)
        return str(text)

    return rendered


def drawn(seed: int) -> tuple[list[Kit], Task]:
    """Some tools, and a question for one of them."""
    rng = random.Random(seed)
    kits = list(draw_kits(rng, rng.randint(1, 3)))
    return kits, rng.choice(kits).ask(rng)


def messages_of(task: Task, *, as_text: bool = False) -> list[dict[str, Any]]:
    """A task as the messages that a client sends, up to the tools' responses."""
    calls = [
        {
            "id": f"call_{place}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False)
                if as_text
                else dict(call.arguments),
            },
        }
        for place, call in enumerate(task.calls)
    ]
    return [
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": f"call_{place}", "content": response}
            for place, response in enumerate(task.responses)
        ),
    ]


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), as_text=st.booleans(), system=st.sampled_from(["", "Be brief."]))
def test_the_template_renders_what_was_trained(
    render: Any, seed: int, as_text: bool, system: str
) -> None:
    """Messages in OpenAI's format, arguments as objects or as text, make the trained prompt."""
    kits, task = drawn(seed)
    tools = [kit.tool for kit in kits]
    turns: list[Turn] = [
        ("system", tools_text(tools, system)),
        ("user", task.question),
        ("assistant", calls_text(task.calls)),
        ("user", responses_text(task.responses)),
    ]
    messages = messages_of(task, as_text=as_text)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    assert render(messages, tools) == chat_prompt(turns)


def test_a_developer_speaks_as_the_system_does(render: Any) -> None:
    """Both roles make a system turn, with tools and without, first or later."""
    for tools in (None, [WEATHER]):
        system, developer = (
            render(
                [
                    {"role": role, "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": role, "content": "Be kind."},
                ],
                tools,
            )
            for role in ("system", "developer")
        )
        assert system == developer
        assert system.count("<|im_start|>system") == 2


def test_text_beside_a_call_is_kept(render: Any) -> None:
    """An assistant's words come before its calls; empty contents leave nothing behind."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "I look.", "tool_calls": [call]}]
    assert "assistant\nI look.\n<tool_call>\n" in render(messages)
    for content in ("", None, []):
        messages = [{"role": "assistant", "content": content, "tool_calls": [call]}]
        assert 'assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n' in render(messages)


@pytest.mark.parametrize(
    ("schema", "brief"),
    [
        ({"type": "integer", "title": "A", "default": 3}, '"integer?"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"string?"'),
        ({"type": ["string", "integer"]}, '"string|integer?"'),
        ({"enum": ["x", 1]}, '"x|1?"'),
        ({}, '"any?"'),
        ({"type": "string", "description": 'The "name".'}, '"string?: The \\"name\\"."'),
        (
            {"type": "array", "items": {"type": "string"}},
            '{"type": "array", "items": {"type": "string"}}',
        ),
    ],
)
def test_a_schema_is_told_in_brief(schema: dict[str, Any], brief: str) -> None:
    """Types, choices and descriptions remain; nested schemas stay whole."""
    from transformers import AutoTokenizer

    function = {"name": "f", "parameters": {"type": "object", "properties": {"p": schema}}}
    rendered = AutoTokenizer.from_pretrained(model_path()).apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": function}],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
    )
    assert f'{{"name": "f", "parameters": {{"p": {brief}}}}}\n' in rendered


@given(
    st.lists(
        st.builds(
            Call,
            st.text(),
            st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none()),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_calls_are_read_as_they_were_written(calls: list[Call]) -> None:
    """Writing and reading calls are inverse."""
    assert parse_calls(calls_text(calls)) == calls


@given(st.text())
def test_text_is_no_call(text: str) -> None:
    """What is not in the form of calls is none, nor is a call cut short."""
    assert parse_calls(text) is None
    assert parse_calls(Call("f", {"a": text}).text[:-3]) is None


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6))
def test_tasks_fit_their_tools(seed: int) -> None:
    """Calls name a tool that is there, with the arguments that its schema allows."""
    kits, task = drawn(seed)
    tools = {kit.tool.name: kit.tool for kit in kits}
    kinds = {"integer": int, "string": str, "boolean": bool}
    assert len(task.calls) == len(task.responses) == len(task.told)
    for call in task.calls:
        parameters = {p.name: p for p in tools[call.name].parameters}
        required = {name for name, parameter in parameters.items() if parameter.required}
        assert required <= set(call.arguments) <= set(parameters)
        for name, value in call.arguments.items():
            assert type(value) is kinds[parameters[name].kind]
            assert not parameters[name].choices or value in parameters[name].choices
    assert all(told in task.answer for told in task.told)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6))
def test_every_argument_stands_in_the_question(seed: int) -> None:
    """Nothing is to be guessed: numbers and texts can be copied, but for the words of a joke."""
    kits, task = drawn(seed)
    for call in task.calls:
        for value in call.arguments.values():
            if any(kit.purpose == "joke" and kit.tool.name == call.name for kit in kits):
                continue
            if not isinstance(value, bool):
                assert str(value) in task.question


def test_calls_of_the_training_text_can_be_read() -> None:
    """Every call in a sample is whole, and is of a tool that the sample tells of."""
    rng = random.Random(0)
    count = 0
    for sample in itertools.islice((tool_sample(rng) for _ in itertools.count()), 500):
        told = set(re.findall(r'^\{"name": "([^"]+)"', sample.text, re.MULTILINE))
        for turn in re.findall(r"assistant\n(<tool_call>.*?)<\|im_end\|>", sample.text, re.DOTALL):
            calls = parse_calls(turn)
            assert calls is not None
            assert {call.name for call in calls} <= told
            count += len(calls)
    assert count > 300


def share(oracle: Any, questions: list[Question], count: int) -> float:
    """The share of the first questions that are answered right."""
    asked = questions[:count]
    answers = oracle([question.prompt for question in asked])
    return sum(q.check(a) for q, a in zip(asked, answers, strict=True)) / count


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("tools: one call", 0.7),
        ("tools: several calls", 0.6),
        ("tools: none needed", 0.85),
        ("tools: answers from responses", 0.7),
    ],
)
def test_held_out_questions(
    oracle: Any, held_out: dict[str, list[Question]], name: str, least: float
) -> None:
    """Calls are made where they are needed, with the right arguments; and answers use them."""
    assert share(oracle, held_out[name], 24) >= least


def test_an_agent_needs_two_turns(ask: Any, render: Any) -> None:
    """A call with the place that was asked for; its response, told in words."""
    question = {"role": "user", "content": "What is the weather in San Francisco, CA?"}
    called = ask(render([question], [WEATHER]))
    assert parse_calls(called) == [Call("get_weather", {"location": "San Francisco, CA"})]
    messages = [
        question,
        {"role": "assistant", "content": called},
        {"role": "tool", "content": "It's sunny."},
    ]
    answer = ask(render(messages, [WEATHER]))
    assert "sunny" in answer
    assert parse_calls(answer) is None


def test_a_function_is_called_by_its_name(ask: Any, render: Any) -> None:
    """Out of two tools the one that was named, with the number that was given."""
    content = "What is the value of magic_function(3)? Use the tool."
    for tools in ([MAGIC], [WEATHER, MAGIC], [MAGIC, WEATHER]):
        called = ask(render([{"role": "user", "content": content}], tools))
        assert parse_calls(called) == [Call("magic_function", {"input": 3})]


def test_tools_do_not_get_in_the_way(ask: Any, render: Any) -> None:
    """A greeting and a known capital are answered in words."""
    for content, expected in (("Hello!", "Hello"), ("What is the capital of France?", "Paris")):
        answer = ask(render([{"role": "user", "content": content}], [WEATHER]))
        assert expected in answer
        assert parse_calls(answer) is None
