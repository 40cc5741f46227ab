"""Clients that others wrote, on a served model: LangChain's, Outlines', and agents with tools."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from pydantic import BaseModel, Field

openai = pytest.importorskip("openai")
langchain_openai = pytest.importorskip("langchain_openai", reason="it is the client under test")

MODEL = "quire/demo"
QUESTION = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=120)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Return the weather of a city."""
    return f"sunny in {city}"


@tool
def get_time(city: Literal["Paris", "Rome"]) -> str:
    """Return the time of day in a city."""
    return f"noon in {city}"


@pytest.fixture
async def chat(served: Any) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that makes LangChain's chat model of the served one."""
    # Its own clients stay open for good.
    sync, asynchronous = openai.DefaultHttpxClient(), openai.DefaultAsyncHttpxClient()

    def make(**kwargs: Any) -> Any:
        defaults = {"temperature": 0, "max_tokens": 64, "timeout": 60, "max_retries": 0}
        return langchain_openai.ChatOpenAI(
            model=MODEL,
            base_url=f"{served.url}/v1",
            api_key=served.api_key,
            http_client=sync,
            http_async_client=asynchronous,
            **{**defaults, **kwargs},
        )

    yield make
    sync.close()
    await asynchronous.aclose()


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key) as client:
        yield client


@pytest.fixture
def with_tools(chat: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``chat``, where the served model's template has a place for tools."""
    try:
        chat().bind_tools([get_weather], tool_choice="any").invoke("p")
    except openai.BadRequestError as error:
        if "trained to call tools" in str(error):
            pytest.skip("the demo model of this version takes no tools")
        raise
    return chat


# -- ChatOpenAI -----------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_text(chat: Callable[..., Any], responses: bool) -> None:
    """An answer comes with its usage and the reason of its end; a stream adds up to it; both
    through `/v1/chat/completions` and `/v1/responses`."""
    llm = chat(use_responses_api=responses, stream_usage=True)
    answer = llm.invoke(QUESTION)
    assert "Paris" in answer.text
    assert answer.usage_metadata["input_tokens"] > 3
    assert answer.usage_metadata["output_tokens"] > 3
    whole: Any = None
    for chunk in llm.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.text == answer.text
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert whole.usage_metadata[name] == answer.usage_metadata[name]
    if not responses:
        assert answer.response_metadata["finish_reason"] == "stop"
        assert whole.response_metadata["finish_reason"] == "stop"


def test_conversation(chat: Callable[..., Any]) -> None:
    """System messages, earlier turns, stop strings and logprobs arrive."""
    turns = [
        SystemMessage("Answer briefly."),
        HumanMessage("My name is Ada."),
        AIMessage("Hello Ada."),
        HumanMessage(QUESTION),
    ]
    assert "Paris" in chat().invoke(turns).text
    assert "Paris" not in chat(stop=["Par"]).invoke(QUESTION).text
    answer = chat(logprobs=True, top_logprobs=2).invoke(QUESTION)
    positions = answer.response_metadata["logprobs"]["content"]
    assert "".join(position["token"] for position in positions).startswith(answer.text)
    assert {len(position["top_logprobs"]) for position in positions} == {2}
    extra = chat(extra_body={"structured_outputs": {"choice": ["Oslo", "Rome"]}})
    assert extra.invoke(QUESTION).text in ("Oslo", "Rome")


async def test_many_at_once(chat: Callable[..., Any]) -> None:
    """Asynchronous answers, batches and streams are those of synchronous calls."""
    llm = chat()
    expected = (await asyncio.to_thread(llm.invoke, QUESTION)).text
    answers = await llm.abatch([QUESTION] * 8)
    assert {answer.text for answer in answers} == {expected}
    assert "".join([chunk.text async for chunk in llm.astream(QUESTION)]) == expected


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's own events
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output(chat: Callable[..., Any], method: str) -> None:
    """An answer is an object of the schema, whole and streamed; JSON mode gives some object."""
    if method == "json_mode":
        # Nothing but the model's own will ends such an object.
        llm = chat(frequency_penalty=1.0).with_structured_output(
            None, method=method, include_raw=True
        )
        assert llm.invoke("JSON: name Ada, age 36")["raw"].text.lstrip().startswith("{")
        return
    llm = chat().with_structured_output(Person, method=method)
    assert isinstance(llm.invoke("JSON: name Ada, age 36"), Person)
    assert isinstance(list(llm.stream("JSON: name Ada, age 36"))[-1], Person)
    raw = chat().with_structured_output(Person, method=method, include_raw=True).invoke("Ada")
    assert raw["parsing_error"] is None
    assert raw["parsed"] == Person.model_validate_json(raw["raw"].text)


def test_function_calling(with_tools: Callable[..., Any]) -> None:
    """A schema as the only function that may be called: the call always parses."""
    llm = with_tools().with_structured_output(Person, method="function_calling")
    assert isinstance(llm.invoke("JSON: name Ada, age 36"), Person)


@pytest.mark.parametrize("choice", ["any", "get_time"])
def test_required_tools(with_tools: Callable[..., Any], choice: str) -> None:
    """With a tool required, or a named one, the answer calls it with arguments of its schema;
    a stream's pieces add up to that call."""
    llm = with_tools().bind_tools(
        [get_weather, get_time], tool_choice=choice, parallel_tool_calls=False
    )
    answer = llm.invoke(WEATHER)
    [call] = answer.tool_calls
    assert answer.invalid_tool_calls == []
    names = {"get_time"} if choice == "get_time" else {"get_weather", "get_time"}
    assert call["name"] in names
    assert call["args"]["city"] in ("Paris", "Rome")
    whole: AIMessageChunk | None = None
    for chunk in llm.stream(WEATHER):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    [streamed] = whole.tool_calls
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])
    assert streamed["id"]


def test_what_tools_said_is_read(with_tools: Callable[..., Any]) -> None:
    """A conversation with calls and what they returned is taken, and tools can be forbidden."""
    call = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1"}
    turns = [
        HumanMessage(WEATHER),
        AIMessage("", tool_calls=[call]),
        ToolMessage("sunny in Paris", tool_call_id="call_1"),
    ]
    for llm in (with_tools(), with_tools().bind_tools([get_weather], tool_choice="none")):
        answer = llm.invoke(turns)
        assert answer.tool_calls == []
        assert answer.text


# -- Outlines -------------------------------------------------------------------------------------


def test_outlines(client: Any, served: Any) -> None:
    """Outlines' model for servers generates text, and text of every kind of type."""
    outlines = pytest.importorskip("outlines")
    model = outlines.from_vllm(client, MODEL)
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 48}
    assert "Paris" in model(QUESTION, **greedy)
    assert "Paris" in "".join(model.stream(QUESTION, **greedy))
    assert model(QUESTION, Literal["Oslo", "Rome"], **greedy) in ("Oslo", "Rome")
    assert int(model("What is 2 + 3?", outlines.types.Regex("[0-9]{1,3}"), **greedy)) >= 0
    text = model("JSON: name Ada, age 36", Person, **greedy)
    assert isinstance(Person.model_validate_json(text), Person)
    grammar = outlines.types.CFG('root ::= "yes" | "no"')
    assert model("Is Paris in France?", grammar, **greedy) in ("yes", "no")
    streamed = "".join(model.stream("JSON: name Ada, age 36", Person, **greedy))
    assert streamed == text
    generator = outlines.Generator(model, Person)
    assert isinstance(Person.model_validate_json(generator("Ada", **greedy)), Person)


async def test_outlines_asynchronously(served: Any) -> None:
    """The same by the asynchronous client."""
    outlines = pytest.importorskip("outlines")
    url = f"{served.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=served.api_key) as client:
        model = outlines.from_vllm(client, MODEL)
        assert "Paris" in await model(QUESTION, temperature=0, max_tokens=32)
        text = await model("Ada", Person, temperature=0, max_tokens=48)
        assert isinstance(Person.model_validate_json(text), Person)


# -- agents ---------------------------------------------------------------------------------------


def check_agent(messages: list[Any]) -> None:
    """Check a run in which a tool was called, and its result answered."""
    kinds = [type(message) for message in messages]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    [call] = messages[1].tool_calls
    assert call["name"] == "get_weather"
    assert messages[2].content == f"sunny in {call['args']['city']}"
    assert messages[3].text


def test_react_agent(with_tools: Callable[..., Any]) -> None:
    """langgraph's agent calls a tool and answers with what it returned."""
    prebuilt = pytest.importorskip("langgraph.prebuilt", reason="it is the agent under test")

    def choose(state: Any, runtime: Any) -> Any:
        # The first turn has to call, so that the test is of the loop and not of the model.
        last = state["messages"][-1]
        choice = "get_weather" if isinstance(last, HumanMessage) else "none"
        return with_tools().bind_tools([get_weather], tool_choice=choice)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer ones say that it moved to langchain
        agent = prebuilt.create_react_agent(choose, [get_weather])
    check_agent(agent.invoke({"messages": [HumanMessage(WEATHER)]})["messages"])


async def test_agent(with_tools: Callable[..., Any]) -> None:
    """langchain's agent does, too, and asynchronously."""
    agents = pytest.importorskip("langchain.agents", reason="it is the agent under test")
    middleware = pytest.importorskip("langchain.agents.middleware")

    class FirstCalls(middleware.AgentMiddleware):  # type: ignore[misc, name-defined]
        def _settled(self, request: Any) -> Any:
            is_first = isinstance(request.messages[-1], HumanMessage)
            return request.override(tool_choice="get_weather" if is_first else "none")

        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(self._settled(request))

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return await handler(self._settled(request))

    agent = agents.create_agent(with_tools(), [get_weather], middleware=[FirstCalls()])
    given = {"messages": [HumanMessage(WEATHER)]}
    check_agent((await asyncio.to_thread(agent.invoke, given))["messages"])
    check_agent((await agent.ainvoke(given))["messages"])


def test_an_agent_decides_by_itself(with_tools: Callable[..., Any]) -> None:
    """Without being told to, the demo model calls the tool that a question is for, and answers
    with what it returned."""
    agents = pytest.importorskip("langchain.agents", reason="it is the agent under test")
    calls: list[str] = []

    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        calls.append(city)
        return json.dumps({"weather": "sunny", "temperature": 20})

    answer = with_tools().bind_tools([get_weather]).invoke(WEATHER)
    if not answer.tool_calls:
        pytest.skip("the demo model of this version does not call tools by itself")
    agent = agents.create_agent(with_tools(), [get_weather])
    messages = agent.invoke({"messages": [HumanMessage(WEATHER)]})["messages"]
    assert calls == ["Paris"]
    assert messages[-1].tool_calls == []
    assert "sunny" in messages[-1].text
