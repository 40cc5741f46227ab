"""ChatVLLM's tools and schemas: what is forced always parses, whatever the model would like."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from pydantic import BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from quire.errors import InvalidRequestError
from quire.integrations.langchain.chat_vllm import ChatVLLM

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}</tools> Write <tool_call>...</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template in the manner of Hermes, so that these tests need no model that calls tools."""


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatVLLM]:
    with ChatVLLM(
        model="quire/demo", temperature=0, max_tokens=400, chat_template=TEMPLATE
    ) as chat:
        yield chat


class Place(BaseModel):
    """A place."""

    kind: Annotated[str, Field(pattern="^(city|river)$")]
    size: Annotated[int, Field(ge=0, le=99)]


class PlaceDict(TypedDict):
    """A place."""

    kind: Annotated[str, ..., "what it is"]


def get_weather(is_cold: bool, degrees: int = 3) -> str:
    """Tell the weather."""
    return "sunny"


@tool
def add(a: bool, b: bool) -> bool:
    """Add two bits."""
    return a or b


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as_tool is a beta
    RUNNABLE = RunnableLambda(lambda x: x["flag"]).as_tool(
        name="run", description="Run.", arg_types={"flag": bool}
    )

SCHEMA = {
    "type": "function",
    "function": {
        "name": "choose",
        "description": "Choose.",
        "parameters": {
            "type": "object",
            "properties": {"one": {"enum": ["left", "right"]}},
            "required": ["one"],
        },
    },
}
TOOLS: dict[str, Any] = {
    "Place": Place,
    "get_weather": get_weather,
    "add": add,
    "run": RUNNABLE,
    "choose": SCHEMA,
}


def joined(chunks: Any) -> Any:
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


@settings(max_examples=12)
@given(
    names=st.lists(st.sampled_from(sorted(TOOLS)), min_size=1, max_size=3, unique=True),
    forced=st.sampled_from(["any", "required", True, "name", "dict"]),
    seed=st.integers(0, 2**31),
    question=st.sampled_from(["Hello", "Tell me a joke.", "What is 1 + 2?"]),
)
def test_forced_calls_always_parse(
    chat: ChatVLLM, names: list[str], forced: Any, seed: int, question: str
) -> None:
    """A call that is asked for comes, of the tool that was named, and with valid arguments; a
    stream's chunks add up to the same."""
    choice = {"name": names[0], "dict": {"function": {"name": names[0]}}}.get(forced, forced)
    bound = chat.bind_tools(
        [TOOLS[name] for name in names],
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=1.0,
        seed=seed,
    )
    answer = bound.invoke(question)
    assert answer.invalid_tool_calls == []
    [call] = answer.tool_calls
    assert call["name"] in ([names[0]] if forced in ("name", "dict") else names)
    assert call["id"]
    arguments: Any = call["args"]
    if call["name"] == "Place":
        Place.model_validate(arguments)
    elif call["name"] == "get_weather":
        assert isinstance(arguments["is_cold"], bool)
    elif call["name"] == "add":
        assert {type(arguments["a"]), type(arguments["b"])} == {bool}
    elif call["name"] == "choose":
        assert arguments["one"] in ("left", "right")
    assert answer.content == ""
    assert answer.response_metadata["finish_reason"] in ("tool_calls", "stop")
    streamed = joined(bound.stream(question))
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], arguments)]
    assert streamed.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert streamed.response_metadata["finish_reason"] == answer.response_metadata["finish_reason"]


async def test_forced_calls_of_a_batch_and_async(chat: ChatVLLM) -> None:
    """Batches and the async forms call alike, and tool messages may follow."""
    bound = chat.bind_tools([SCHEMA, add], tool_choice="choose")
    answer = bound.invoke("Hello")
    [one, two] = bound.batch(["Hello", "Hello"])
    other = await bound.ainvoke("Hello")
    for message in (one, two, other):
        assert message.tool_calls[0]["args"] == answer.tool_calls[0]["args"]
    call = answer.tool_calls[0]
    again = chat.bind_tools([SCHEMA, add]).invoke(
        [HumanMessage("Hello"), answer, ToolMessage("done", tool_call_id=call["id"])],
        max_tokens=5,
    )
    assert isinstance(again, AIMessage)


def test_no_call_where_none_is_wanted(chat: ChatVLLM) -> None:
    """With "none" or False nothing is taken for a call."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": true, "b": true}}\n</tool_call>'
    for choice in ("none", False):
        bound = chat.bind_tools([add], tool_choice=choice)
        answer = bound.invoke("Hello", structured_outputs={"choice": [text]})
        assert (answer.tool_calls, answer.content) == ([], text)


def test_what_is_bound(chat: ChatVLLM) -> None:
    """Tools and choices arrive in OpenAI's shape, whatever they were given as."""
    bound: Any = chat.bind_tools([Place, PlaceDict, add], strict=True, parallel_tool_calls=False)
    assert [t["function"]["name"] for t in bound.kwargs["tools"]] == ["Place", "PlaceDict", "add"]
    assert all(t["function"]["strict"] for t in bound.kwargs["tools"])
    assert bound.kwargs["parallel_tool_calls"] is False
    assert "tool_choice" not in bound.kwargs
    choices = {
        "any": "required",
        "auto": "auto",
        "none": "none",
        "add": {"type": "function", "function": {"name": "add"}},
    }
    for given_choice, expected in choices.items():
        bound = chat.bind_tools([add], tool_choice=given_choice)
        assert bound.kwargs["tool_choice"] == expected
    named: Any = chat.bind_tools([add], tool_choice={"type": "tool", "name": "add"})
    assert named.kwargs["tool_choice"] == choices["add"]


def test_bad_tools_are_refused(chat: ChatVLLM) -> None:
    """What is no tool, no choice or no argument is named before any call."""
    with pytest.raises(InvalidRequestError, match=r"tools\[1\] is no tool"):
        chat.bind_tools([add, 5])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match=r"tool_choice must be .*'add'"):
        chat.bind_tools([add], tool_choice="subtract")
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        chat.bind_tools([add], temprature=1)
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        chat.bind_tools([add], tool_choice="any").invoke(
            "Hello", response_format={"type": "json_object"}
        )


SCHEMAS: dict[str, Any] = {
    "pydantic": Place,
    "json": {
        "title": "Thing",
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "blue"]},
            "parts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            "inner": {
                "type": "object",
                "properties": {"deep": {"type": "null"}},
                "required": ["deep"],
                "additionalProperties": False,
            },
        },
        "required": ["color", "parts", "inner"],
        "additionalProperties": False,
    },
    "untitled": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
    "function": SCHEMA,
}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_structured_output_validates(chat: ChatVLLM, name: str, method: Any) -> None:
    """An answer is of its schema by either method; a stream ends with the same value."""
    if (name, method) == ("untitled", "function_calling"):
        with pytest.raises(InvalidRequestError, match="no tool"):
            chat.with_structured_output(SCHEMAS[name], method=method)
        return
    jsonschema = pytest.importorskip("jsonschema")
    schema = SCHEMAS[name]
    structured = chat.with_structured_output(schema, method=method)
    value = structured.invoke("Hello")
    if name == "pydantic":
        assert isinstance(value, Place)
    else:
        parameters = schema["function"]["parameters"] if name == "function" else schema
        jsonschema.validate(value, parameters)
    values = list(structured.stream("Hello"))
    assert values[-1] == value
    if name == "json":
        assert len(values) > 2
        assert values[0] in ({}, {"color": ""}, {"color": "red"}, {"color": "blue"})
    raw = chat.with_structured_output(schema, method=method, include_raw=True).invoke("Hello")
    assert (raw["parsed"], raw["parsing_error"]) == (value, None)
    assert isinstance(raw["raw"], AIMessage)


class Tree(BaseModel):
    """A tree."""

    leaf: Annotated[str, Field(pattern="^[xy]$")]
    branches: Annotated[list[Tree], Field(max_length=1)] = []


class Forest(BaseModel):
    """Trees."""

    trees: Annotated[list[Tree], Field(min_length=1, max_length=1)]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Tree, Forest])
def test_classes_that_hold_themselves_are_enforced(
    chat: ChatVLLM, schema: Any, method: Any
) -> None:
    """Where a class stands within itself the answer is one of it, too, and not anything."""
    structured = chat.with_structured_output(schema, method=method)
    for seed in range(5):
        assert isinstance(structured.invoke("Hello", temperature=1.0, seed=seed), schema)


def test_schemas_of_no_object_are_enforced(chat: ChatVLLM) -> None:
    """A list or a choice with a title is what the answer is; a tool of it is refused."""
    schema = {"title": "Sides", "type": "array", "items": {"enum": ["left"]}, "minItems": 1}
    bounded = {**schema, "maxItems": 1}
    assert chat.with_structured_output(bounded).invoke("Hello") == ["left"]
    assert chat.with_structured_output({"title": "Side", "enum": [7]}).invoke("Hello") == 7
    with pytest.raises(InvalidRequestError, match="arguments are an object"):
        chat.with_structured_output(bounded, method="function_calling")
    with pytest.raises(InvalidRequestError, match="arguments are an object"):
        chat.bind_tools([bounded])


async def test_structured_output_of_chains(chat: ChatVLLM) -> None:
    """Behind a prompt, in batches and asynchronously."""
    structured = ChatPromptTemplate.from_template("{x}") | chat.with_structured_output(Place)
    values = structured.batch([{"x": "Hello"}, {"x": "Help"}])
    assert [type(value) for value in values] == [Place, Place]
    assert await structured.ainvoke({"x": "Hello"}) == values[0]
    streamed = [value async for value in structured.astream({"x": "Help"})]
    assert streamed[-1] == values[1]


def test_streaming_that_is_disabled_still_parses(chat: ChatVLLM) -> None:
    """A stream of one piece has the value, too, by both methods."""
    whole = ChatVLLM(client=chat.client, temperature=0, chat_template=TEMPLATE)
    whole.disable_streaming = True
    for method in ("json_schema", "function_calling"):
        structured = whole.with_structured_output(Place, method=method)  # type: ignore[arg-type]
        assert list(structured.stream("Hello")) == [structured.invoke("Hello")]


def test_an_answer_that_was_cut_is_an_error(chat: ChatVLLM) -> None:
    """What max_new_tokens cuts is never taken for the value, streamed or not."""
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(Place, method=method, max_tokens=3)  # type: ignore[arg-type]
        with pytest.raises(OutputParserException, match="raise max_new_tokens"):
            structured.invoke("Hello")
        with pytest.raises(OutputParserException, match="raise max_new_tokens"):
            list(structured.stream("Hello"))
    raw = chat.with_structured_output(Place, include_raw=True, max_tokens=3).invoke("Hello")
    assert raw["parsed"] is None
    assert "max_new_tokens" in str(raw["parsing_error"])


def test_json_mode_validates_afterwards(chat: ChatVLLM) -> None:
    """Any object is asked for; what the class does not take is an error with the reason."""
    mode: Any = chat.with_structured_output(method="json_mode")
    assert mode.steps[0].kwargs["response_format"] == {"type": "json_object"}
    parser: Any = chat.with_structured_output(Place, method="json_mode").steps[-1]  # type: ignore[attr-defined]
    with pytest.raises(OutputParserException, match="no valid Place") as caught:
        parser.invoke(AIMessage(json.dumps({"kind": "hill", "size": 1})))
    assert isinstance(caught.value.__cause__, ValidationError)
    with pytest.raises(OutputParserException, match="no JSON"):
        parser.invoke(AIMessage("well"))


def test_tools_beside_a_schema(chat: ChatVLLM) -> None:
    """With tools the model may call before it answers, and the value is None then."""
    structured: Any = chat.with_structured_output(Place, tools=[add])
    assert isinstance(structured.invoke("Hello"), Place | None)
    call = {"name": "add", "args": {}, "id": "1", "type": "tool_call"}
    assert structured.steps[-1].invoke(AIMessage("", tool_calls=[call])) is None  # type: ignore[list-item]


def test_bad_schemas_are_refused(chat: ChatVLLM) -> None:
    """A method, a schema or a mixture that cannot be is named before any call."""
    with pytest.raises(InvalidRequestError, match="method must be one of"):
        chat.with_structured_output(Place, method="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="needs a schema"):
        chat.with_structured_output()
    with pytest.raises(InvalidRequestError, match="schema"):
        chat.with_structured_output(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="tools="):
        chat.with_structured_output(Place, method="json_mode", tools=[add])
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        chat.with_structured_output(Place, temprature=1)
