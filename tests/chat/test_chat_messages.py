"""Messages and tools of OpenAI's API, checked and written for chat templates."""

from __future__ import annotations

import copy

import pytest

from quire import InvalidRequestError
from quire.chat import ChatFormat, template_messages, template_tools
from quire.chat.tools import read_tool_choice, read_tools

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
CONVERSATION = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "hm", "tool_calls": None},
    {"role": "user", "content": "Sure?", "name": "Ann"},
]


def test_a_conversation_is_written_as_templates_take_it_and_left_as_it_was():
    before = copy.deepcopy(CONVERSATION)
    assert template_messages(CONVERSATION) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": {"a": [1]}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "hm"},
        {"role": "user", "content": "Sure?", "name": "Ann"},
    ]
    assert before == CONVERSATION


def test_arguments_that_are_no_json_object_stay_text_and_empty_ones_are_an_object():
    def arguments(text):
        call = {"function": {"name": "f", "arguments": text}}
        [message] = template_messages([{"role": "assistant", "tool_calls": [call]}])
        return message["tool_calls"][0]["function"]["arguments"]

    assert [arguments(text) for text in ("", "  ", None, {})] == [{}] * 4
    for text in ('{"a": ', "[1]", "3"):
        assert arguments(text) == text


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("hello", "messages[1] "),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "function", "content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": [IMAGE]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "user", "content": "x", "name": 3}, "messages[1].name"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": CALL}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [3]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[1].audio"),
        ({"role": "tool", "tool_call_id": 3, "content": "x"}, "messages[1].tool_call_id"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(message, place):
    with pytest.raises(InvalidRequestError) as caught:
        template_messages([{"role": "user", "content": "x"}, message])
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize("messages", ["hello", {}, 3, [], None])
def test_messages_are_a_list_that_is_not_empty(messages):
    with pytest.raises(InvalidRequestError, match=r"^messages must be"):
        template_messages(messages)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
    },
    {"type": "function", "name": "g", "parameters": None, "description": None},
]


def test_tools_are_written_without_what_templates_do_not_know():
    empty = {"type": "object", "properties": {}}
    assert template_tools(TOOLS) == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "g", "parameters": empty}},
    ]
    assert template_tools(None) is None
    assert template_tools([]) is None
    assert [tool.strict for tool in read_tools(TOOLS)] == [True, False]


@pytest.mark.parametrize(
    ("tools", "place"),
    [
        ("f", "tools must"),
        ([3], "tools[0]"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([TOOLS[0], TOOLS[0]], "tools[1].function.name"),
        ([{"function": {"name": "f", "description": 3}}], "tools[0].function.description"),
        ([{"function": {"name": "f", "strict": "yes"}}], "tools[0].function.strict"),
        ([{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        ([{"function": {"name": "f", "parameters": {"a": {1}}}}], "tools[0].function.parameters"),
        (
            [{"function": {"name": "f", "parameters": {"type": "string"}}}],
            "tools[0].function.parameters.type",
        ),
    ],
)
def test_a_tool_that_is_none_is_named_by_its_place(tools, place):
    with pytest.raises(InvalidRequestError) as caught:
        template_tools(tools)
    assert str(caught.value).startswith(place)


def test_a_choice_says_which_tools_may_and_must_be_called():
    tools = read_tools(TOOLS)

    def choice(value):
        read = read_tool_choice(value, tools)
        return [tool.name for tool in read.tools], read.required, read.single

    assert choice("auto") == choice(None) == (["f", "g"], False, False)
    assert choice("none") == ([], False, False)
    assert choice("required") == (["f", "g"], True, False)
    named = {"type": "function", "function": {"name": "g"}}
    assert choice(named) == choice({"type": "function", "name": "g"}) == (["g"], True, True)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert choice(allowed) == (["g"], True, False)


@pytest.mark.parametrize(
    "value",
    [
        *("any", 3, {}, {"type": "function"}, {"type": "function", "function": {"name": "h"}}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["f"]}},
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(value):
    with pytest.raises(InvalidRequestError, match=r"^tool_choice"):
        ChatFormat.for_model("", "hermes").reader(TOOLS, value)


def test_a_call_cannot_be_required_without_tools():
    for value in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(InvalidRequestError, match=r"^tool_choice"):
            ChatFormat.for_model("", "hermes").reader(None, value)


def test_ids_of_other_origin_become_what_a_mistral_template_takes_and_stay_pairs():
    mistral = ChatFormat.for_model("", "mistral").messages(CONVERSATION)
    call, answer = mistral[2]["tool_calls"][0]["id"], mistral[3]["tool_call_id"]
    assert call == answer
    assert len(call) == 9
    assert call.isalnum()
    own = [{"role": "tool", "tool_call_id": "abcDEF123", "content": "x"}]
    assert ChatFormat.for_model("", "mistral").messages(own) == own
    assert ChatFormat.for_model("", "hermes").messages(CONVERSATION) == template_messages(
        CONVERSATION
    )
