"""``/v1/chat/completions``: what is served is what the engine says in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Literal

import httpx
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from sse import events_of

from quire import LLM, SamplingParams
from quire.async_llm import AsyncLLM
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import RequestOutputKind
from quire.server.app import build_app
from quire.server.service import Service
from quire.server.settings import ServerSettings

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
TALK = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of Italy?"}]},
    {"role": "assistant", "content": "The capital of Italy is Rome."},
    {"role": "user", "content": "And of Spain?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Paris"]}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["a"],
            },
        },
    },
]
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content or message.tool_calls | tojson }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def chat(http: httpx.AsyncClient, messages: list[dict] = CAPITAL, **body: Any) -> dict:
    answer = await http.post("/v1/chat/completions", json={"messages": messages, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def chat_stream(
    http: httpx.AsyncClient, messages: list[dict] = CAPITAL, **body: Any
) -> tuple[list[dict], dict[int, dict]]:
    """Return the chunks, and the messages that clients make of them, by index."""
    answer = await http.post(
        "/v1/chat/completions", json={"messages": messages, "stream": True, **body}
    )
    assert answer.status_code == 200, answer.text
    chunks = events_of(answer.text)
    made: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            message = made.setdefault(
                choice["index"],
                {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None},
            )
            assert message["finish_reason"] is None, "something comes after the end"
            message["finish_reason"] = choice["finish_reason"]
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                calls = message["tool_calls"]
                if call["index"] == len(calls):
                    assert call["type"] == "function"
                    assert call["id"]
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return chunks, made


@pytest.mark.parametrize("messages", [CAPITAL, TALK], ids=["one", "several"])
async def test_served_answers_are_the_engines(
    http: httpx.AsyncClient, demo_llm: LLM, messages: list[dict]
) -> None:
    """The text of an answer, whole and streamed, is that of LLM.chat."""
    params = SamplingParams(temperature=0, max_tokens=20)
    [expected] = demo_llm.chat(messages, params, use_tqdm=False)
    answer = await chat(http, messages, temperature=0, max_tokens=20)
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected.outputs[0].text,
        "refusal": None,
    }
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    chunks, made = await chat_stream(http, messages, temperature=0, max_tokens=20)
    assert made[0]["content"] == expected.outputs[0].text
    assert made[0]["finish_reason"] == expected.outputs[0].finish_reason
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_an_answer_takes_the_room_that_is_left(http: httpx.AsyncClient) -> None:
    """Without max_tokens an answer ends when the model ends it, or when its window is full."""
    long = [{"role": "user", "content": "red " * 1990}]
    answer = await chat(http, long, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 2048
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_max_tokens_bound_an_answer(http: httpx.AsyncClient, name: str) -> None:
    """OpenAI's old name and its new one mean the same."""
    answer = await chat(http, **{name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_samples_are_streamed_side_by_side(http: httpx.AsyncClient) -> None:
    """With n, each index is a message of its own, the same whole and streamed."""
    body = {"n": 3, "seed": 11, "temperature": 1.5, "max_tokens": 10}
    whole = await chat(http, **body)
    chunks, made = await chat_stream(http, **body, stream_options={"include_usage": True})
    assert [made[i]["content"] for i in range(3)] == [
        choice["message"]["content"] for choice in whole["choices"]
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_logprobs_have_each_token_and_its_bytes(
    http: httpx.AsyncClient, demo_llm: LLM
) -> None:
    """Log-probabilities are the engine's; the bytes of all tokens are the text's."""
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=2)
    [expected] = demo_llm.chat(CAPITAL, params, use_tqdm=False)
    body = {"temperature": 0, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    answer = await chat(http, **body)
    content = answer["choices"][0]["logprobs"]["content"]
    output = expected.outputs[0]
    for token_id, entries, item in zip(output.token_ids, output.logprobs, content, strict=True):
        assert item["logprob"] == pytest.approx(entries[token_id].logprob, abs=1e-4)
        assert len(item["top_logprobs"]) == 2
        values = [other["logprob"] for other in item["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    said = b"".join(bytes(item["bytes"]) for item in content[:-1])  # the last one is the end
    assert said.decode() == output.text
    chunks, _ = await chat_stream(http, **body)
    streamed = [
        item
        for chunk in chunks
        for choice in chunk["choices"]
        for item in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert [item["token"] for item in streamed] == [item["token"] for item in content]


async def test_only_the_chosen_tokens_without_top_logprobs(http: httpx.AsyncClient) -> None:
    """``logprobs`` alone lists no others."""
    answer = await chat(http, max_tokens=3, logprobs=True)
    for item in answer["choices"][0]["logprobs"]["content"]:
        assert item["top_logprobs"] == []


async def test_the_last_message_is_gone_on_with(http: httpx.AsyncClient, demo_llm: LLM) -> None:
    """``continue_final_message`` leaves it open; ``echo`` puts it before what follows."""
    messages = [*CAPITAL, {"role": "assistant", "content": "The capital of"}]
    [expected] = demo_llm.chat(
        messages,
        SamplingParams(temperature=0, max_tokens=20),
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    body = {"temperature": 0, "max_tokens": 20, "continue_final_message": True}
    answer = await chat(http, messages, **body)
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    answer = await chat(http, messages, **body, echo=True)
    said = "The capital of" + expected.outputs[0].text
    assert answer["choices"][0]["message"]["content"] == said
    _, made = await chat_stream(http, messages, **body, echo=True)
    assert made[0]["content"] == said


async def test_template_variables_reach_the_template(http: httpx.AsyncClient) -> None:
    """``chat_template_kwargs`` and ``reasoning_effort`` are variables of the template."""
    template = "{{ messages[0].content }} {{ mood }} {{ reasoning_effort }}"
    answer = await http.post(
        "/tokenize",
        json={
            "messages": CAPITAL,
            "chat_template": template,
            "chat_template_kwargs": {"mood": "fine", "reasoning_effort": "low"},
        },
    )
    back = await http.post("/detokenize", json={"tokens": answer.json()["tokens"]})
    assert back.json()["prompt"] == "What is the capital of France? fine low"
    one = await chat(
        http, chat_template=template, reasoning_effort="high", return_token_ids=True, max_tokens=1
    )
    back = await http.post("/detokenize", json={"tokens": one["prompt_token_ids"]})
    assert back.json()["prompt"].endswith(" high")


Scripted = Callable[..., httpx.AsyncClient]


async def test_what_tools_and_a_format_have_against_each_other_is_told_of_the_format(
    http: httpx.AsyncClient,
) -> None:
    """``param`` is a field that the request has, not the engine's name for it."""
    body = {
        "messages": CAPITAL,
        "tools": TOOLS,
        "tool_choice": "required",
        "chat_template": TEMPLATE,
        "response_format": {"type": "json_object"},
    }
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_a_template_of_a_request_is_refused_unless_it_is_trusted(
    demo_llm: LLM, path: str
) -> None:
    """It would run: some thirty characters of one take all memory, or minutes of a core."""
    settings = ServerSettings(served_model_names=("demo",))
    service = Service(AsyncLLM.from_llm(demo_llm), settings, demo_llm.get_tokenizer())
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for template in ("{{ 'a'|center(10**10) }}", "x"):
            body = {"messages": CAPITAL, "chat_template": template}
            answer = await client.post(path, json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "chat_template"


@pytest_asyncio.fixture
async def scripted(demo_llm: LLM) -> AsyncIterator[Scripted]:
    """Returns a client of a server whose model says a given text, token by token."""
    tokenizer = demo_llm.get_tokenizer()
    async with AsyncExitStack() as stack:

        def make(said: str, **settings: Any) -> httpx.AsyncClient:
            own = ServerSettings(
                served_model_names=("demo",), trust_request_chat_template=True, **settings
            )
            service = Service(AsyncLLM.from_llm(demo_llm), own, tokenizer)
            ids = tokenizer.encode(said)

            async def generate(
                prompt: dict, params: SamplingParams, **options: Any
            ) -> AsyncIterator[RequestOutput]:
                deltas = params.output_kind is RequestOutputKind.DELTA
                begun = 0 if deltas else len(ids) - 1
                written = ""
                for i in range(begun, len(ids)):
                    text = tokenizer.decode(ids[: i + 1])
                    output = CompletionOutput(0, text[len(written) :], ids[i : i + 1])
                    output.finish_reason = "stop" if i == len(ids) - 1 else None
                    written = text
                    yield RequestOutput(
                        "r",
                        prompt["prompt"],
                        prompt["prompt_token_ids"],
                        outputs=[output],
                        finished=output.finished(),
                    )

            service.generate = generate  # type: ignore[method-assign]
            transport = httpx.ASGITransport(build_app(service))
            client = httpx.AsyncClient(transport=transport, base_url="http://server")
            stack.push_async_callback(client.aclose)
            return client

        yield make


class City(BaseModel):
    name: Literal["Rome", "Paris"]
    size: Literal["small", "large"]


async def test_response_formats_are_kept_to(client: openai.AsyncOpenAI) -> None:
    """Text that has to match something does: JSON, a schema, a regex, a choice, a grammar."""
    formats: dict[str, tuple[dict, Any]] = {
        "object": ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
        "schema": (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "city",
                    "strict": True,
                    "schema": City.model_json_schema(),
                },
            },
            City.model_validate_json,
        ),
        "regex": ({"type": "regex", "regex": "[ab]{4}"}, lambda text: set(text) <= {"a", "b"}),
        "choice": (
            {"type": "choice", "choice": ["Rome", "Oslo"]},
            lambda text: text in ("Rome", "Oslo"),
        ),
        "grammar": (
            {"type": "grammar", "grammar": 'start: "x"+ "y"'},
            lambda text: text.strip("x") in ("", "y"),
        ),
        "text": ({"type": "text"}, bool),
    }
    for kind, (response_format, is_right) in formats.items():
        answer = await client.chat.completions.create(
            model="demo",
            messages=CAPITAL,
            response_format=response_format,
            max_tokens=100,
            seed=2,
            extra_body={"bad_words": ["{}"]} if kind == "object" else None,
        )
        if answer.choices[0].finish_reason == "stop":
            assert is_right(answer.choices[0].message.content), kind


async def test_openais_helpers_parse_models(client: openai.AsyncOpenAI) -> None:
    """``parse`` and ``stream`` of the official client work with a pydantic model."""
    if not hasattr(client.chat.completions, "parse"):
        pytest.skip("this version of the client has it as a beta")
    common = {"model": "demo", "messages": CAPITAL, "response_format": City, "seed": 4}
    answer = await client.chat.completions.parse(**common, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, City)
    async with client.chat.completions.stream(**common, temperature=0) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "add"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
    ids=["required", "add", "weather"],
)
async def test_calls_that_are_asked_for_always_parse(
    http: httpx.AsyncClient, choice: Any, names: set[str]
) -> None:
    """``required`` and named tools give a call with valid arguments, whole and streamed."""
    body = {"tools": TOOLS, "tool_choice": choice, "chat_template": TEMPLATE, "temperature": 0}
    answer = await chat(http, **body, parallel_tool_calls=False)
    [one] = answer["choices"]
    [call] = one["message"]["tool_calls"]
    assert one["finish_reason"] == "tool_calls"
    assert one["message"]["content"] is None
    assert call["type"] == "function"
    assert call["function"]["name"] in names
    arguments = json.loads(call["function"]["arguments"])
    assert arguments.get("city") in ("Rome", "Paris") or 0 <= arguments["a"] <= 9
    _, made = await chat_stream(http, **body, parallel_tool_calls=False)
    assert made[0]["tool_calls"] == [call["function"]]
    assert made[0]["finish_reason"] == "tool_calls"
    assert made[0]["content"] == ""


async def test_a_call_of_the_models_own_is_read(scripted: Scripted) -> None:
    """With ``auto`` what the model writes as a call becomes one; with ``none`` it is text."""
    http = scripted(f"I look.\n{CALL}", tool_call_parser="hermes")
    body = {"tools": TOOLS, "chat_template": TEMPLATE}
    [choice] = (await chat(http, **body))["choices"]
    expected = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [expected]
    _, made = await chat_stream(http, **body)
    assert made[0]["content"] == "I look."
    assert made[0]["tool_calls"] == [expected]
    assert made[0]["finish_reason"] == "tool_calls"
    [choice] = (await chat(http, **body, tool_choice="none"))["choices"]
    assert choice["message"]["content"] == f"I look.\n{CALL}"
    assert choice["finish_reason"] == "stop"


async def test_reasoning_is_kept_apart(scripted: Scripted) -> None:
    """What stands between think tags is reasoning_content and reasoning, whole and streamed."""
    http = scripted("<think>Let me see.</think>Paris", reasoning_parser="deepseek_r1")
    message = (await chat(http))["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Let me see."
    assert message["content"] == "Paris"
    _, made = await chat_stream(http)
    assert made[0]["reasoning_content"] == "Let me see."
    assert made[0]["content"] == "Paris"
    hidden = (await chat(http, include_reasoning=False))["choices"][0]["message"]
    assert "reasoning" not in hidden
    assert hidden["content"] == "Paris"


async def test_a_tools_answer_goes_back_to_the_model(http: httpx.AsyncClient) -> None:
    """A conversation with a call and its result is a prompt like any other."""
    messages = [
        *CAPITAL,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = await chat(http, messages, tools=TOOLS, chat_template=TEMPLATE, max_tokens=4)
    assert answer["usage"]["completion_tokens"] > 0


async def test_the_developers_role_is_the_systems(http: httpx.AsyncClient) -> None:
    """OpenAI's newer name of the role writes the same prompt."""
    ids = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, *CAPITAL]
        answer = await http.post("/tokenize", json={"messages": messages})
        ids.append(answer.json()["tokens"])
    assert ids[0] == ids[1]


def test_openais_client_chats_with_a_real_process(served) -> None:
    """Sync client: whole, streamed, and through the stream helper."""
    with openai.OpenAI(api_key="EMPTY", base_url=f"{served.url}/v1") as client:
        common = {"model": "quire/demo", "messages": CAPITAL, "temperature": 0}
        answer = client.chat.completions.create(**common)
        text = answer.choices[0].message.content
        assert "Paris" in text
        stream = client.chat.completions.create(
            **common, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        if hasattr(client.chat.completions, "stream"):  # a beta of older releases
            with client.chat.completions.stream(**common) as helper:
                assert helper.get_final_completion().choices[0].message.content == text


async def test_many_async_clients_at_once_get_their_own_answers(served) -> None:
    """Async client: requests that run in one batch do not mix."""
    cities = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    async with openai.AsyncOpenAI(api_key="EMPTY", base_url=f"{served.url}/v1") as client:

        async def ask(country: str) -> str:
            question = {"role": "user", "content": f"What is the capital of {country}?"}
            text = ""
            stream = await client.chat.completions.create(
                model="quire/demo", messages=[question], temperature=0, stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return text

        answers = await asyncio.gather(*map(ask, cities))
    for city, text in zip(cities.values(), answers, strict=True):
        assert city in text
