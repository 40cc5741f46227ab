"""``/v1/responses``: the answers of a chat, in items and events that the official client reads."""

from __future__ import annotations

import json

import pytest

openai = pytest.importorskip("openai")

MODEL = "quire/demo"
QUESTION = "What is the capital of France?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key) as client:
        if not hasattr(client, "responses"):
            pytest.skip("this version of the client has no Responses API")
        yield client


def ask(client, given=QUESTION, **fields):
    return client.responses.create(model=MODEL, input=given, **{"temperature": 0, **fields})


def chat(client, messages, **fields):
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)
    return answer.choices[0].message


def test_the_text_is_that_of_a_chat(client):
    """Also with instructions, with an earlier turn, and with parts."""
    user = {"role": "user", "content": QUESTION}
    assert ask(client).output_text == chat(client, [user]).content
    system = {"role": "system", "content": "Answer in one word."}
    answer = ask(client, instructions=system["content"])
    assert answer.output_text == chat(client, [system, user]).content
    turns = [user, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And?"}]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Paris."}],
        },
        turns[2],
    ]
    assert ask(client, items).output_text == chat(client, turns).content
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_cut_answer_says_so(client):
    answer = ask(client, max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 2


def test_the_events_build_the_response(client):
    """Every item and part is opened, grows and is closed; the numbers run on."""
    whole = ask(client)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.status == "completed"
    assert final.usage == whole.usage
    kinds = [event.type for event in events if event.type.startswith("response.")]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == list(range(len(numbers)))


def test_a_required_call_is_an_item_with_arguments_that_match(client):
    for stream in (False, True):
        fields = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 200}
        question = "What is the weather in Paris?"
        if stream:
            with client.responses.stream(model=MODEL, input=question, **fields) as events:
                kinds = [event.type for event in events]
                answer = events.get_final_response()
            assert "response.function_call_arguments.delta" in kinds
            assert "response.function_call_arguments.done" in kinds
        else:
            answer = ask(client, question, **fields)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert calls
        assert calls[0].name == "get_weather"
        assert set(json.loads(calls[0].arguments)) == {"city"}
    items = [
        {"role": "user", "content": question},
        {
            "type": "function_call",
            "call_id": calls[0].call_id,
            "name": calls[0].name,
            "arguments": calls[0].arguments,
        },
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "Sunny."},
    ]
    answer = ask(client, items, tools=[TOOL], max_output_tokens=40)
    assert answer.output


def test_a_format_is_kept(client):
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    answer = ask(client, "Describe a person.", text={"format": form}, max_output_tokens=100)
    person = json.loads(answer.output_text)
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 120


def test_logprobs_are_those_of_the_tokens(client):
    answer = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    [item] = answer.output
    [part] = item.content
    assert "".join(entry.token for entry in part.logprobs).startswith(part.text)
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    [item] = ask(client, top_logprobs=1, extra_body={"return_tokens_as_token_ids": True}).output
    assert all(entry.token.startswith("token_id:") for entry in item.content[0].logprobs)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("input", {"input": 5}),
        ("input[0]", {"input": [5]}),
        ("input[1].role", {"input": [{"role": "user", "content": "a"}, {"role": "robot"}]}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "x"}]}]}),
        ("input[0].type", {"input": [{"type": "computer_call"}]}),
        ("input[0].call_id", {"input": [{"type": "function_call_output", "output": "x"}]}),
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("background", {"background": True}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tool_choice.type", {"tools": [TOOL], "tool_choice": {"type": "file_search"}}),
        ("text.format", {"text": {"format": {"type": "yaml"}}}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("n", {"n": 2}),
        ("truncation", {"truncation": "auto"}),
        ("top_logprobs", {"top_logprobs": 10**6}),
        ("top_logprobs", {"top_logprobs": -2}),
        ("return_token_ids", {"return_token_ids": True}),
        ("length_penalty", {"length_penalty": 2.0}),
        ("tools[0].name", {"tools": [{"type": "function"}]}),
        ("tools[0].parameters", {"tools": [{**TOOL, "parameters": 3}]}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("temperature", {"temperature": -1}),
        ("input", {"input": "long " * 5000}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(client, param, fields):
    for stream in (False, True):
        body = {"model": MODEL, "input": "Hello", "stream": stream, **fields}
        with pytest.raises(openai.APIStatusError) as caught:
            client.post("/responses", body=body, cast_to=object)
        assert caught.value.status_code == 400
        assert caught.value.body["param"].startswith(param)
