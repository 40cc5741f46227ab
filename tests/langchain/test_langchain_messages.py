"""Messages to OpenAI's shape and back: nothing is lost, and what cannot be said is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from quire.chat import ChatFormat
from quire.errors import InvalidRequestError
from quire.integrations.langchain.chat_results import (
    ChatChunkBuilder,
    to_chat_result,
    whole_chunk,
)
from quire.integrations.langchain.messages import openai_messages, text_of
from quire.outputs import CompletionOutput, RequestOutput

CALL = {"name": "f", "args": {"x": "é"}, "id": "1", "type": "tool_call"}
WRITTEN = {
    "id": "1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": "é"}'},
}


def test_roles_and_fields() -> None:
    """Each kind of message has its role, and its name, calls and reasoning go with it."""
    messages: list[BaseMessage] = [
        SystemMessage("s"),
        SystemMessage("d", additional_kwargs={"__openai_role__": "developer"}),
        HumanMessage("h", name="ann"),
        AIMessage("", tool_calls=[CALL], additional_kwargs={"reasoning_content": "hm"}),
        ToolMessage("t", tool_call_id="1"),
        ChatMessage("c", role="user"),
        AIMessageChunk(content="a"),
    ]
    assert openai_messages(messages) == [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "h", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [WRITTEN], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "t"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "1", "name": "f", "input": {}}],
        ["a", {"type": "tool_call", "id": "1", "name": "f", "args": {}}],
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "a"}],
        [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}],
    ],
)
def test_blocks_of_an_answer(content: Any) -> None:
    """Answers in blocks, of any provider, become text, reasoning and calls, each call once."""
    has_call = "id" in str(content)
    for calls in ([CALL], []):
        message = AIMessage(content, tool_calls=calls)
        [converted] = openai_messages([message])
        assert converted["content"] == "a"
        assert len(converted.get("tool_calls", [])) == (1 if calls or has_call else 0)
        assert ("reasoning_content" in converted) == ("hm" in str(content))
    assert text_of(AIMessage(content)) == "a"


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "text", "text": "a"}, {"type": "image", "base64": "AA=="}]),
        HumanMessage(["a", {"type": "input_audio", "input_audio": {}}]),
        ToolMessage([{"type": "text", "text": "a"}, {"type": "file"}], tool_call_id="1"),
        AIMessage([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
    ],
)
def test_what_is_no_text_is_refused(message: BaseMessage) -> None:
    """Images, sound and files are refused, and their place is named."""
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.content\[1\] is of type"):
        openai_messages([HumanMessage("a"), message])


def test_messages_for_no_model_are_refused() -> None:
    """Kinds of messages that no chat template knows are named."""
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] is a FunctionMessage"):
        openai_messages([FunctionMessage("a", name="f")])


def test_invalid_calls_stay_in_the_conversation() -> None:
    """A call that could not be read is shown to the model as it wrote it."""
    broken: Any = {"name": "f", "args": '{"x": ', "id": "2", "error": "cut"}
    [converted] = openai_messages([AIMessage("", invalid_tool_calls=[broken])])
    assert converted["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": '}


HERMES = ChatFormat.for_model(None, "hermes", "qwen3")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def output_of(text: str, reason: str | None = "stop") -> RequestOutput:
    completion = CompletionOutput(
        index=0, text=text, token_ids=[1] * len(text), finish_reason=reason, logprobs=None
    )
    return RequestOutput(
        request_id="0",
        prompt="p",
        prompt_token_ids=[1, 2, 3],
        prompt_logprobs=None,
        outputs=[completion],
        finished=reason is not None,
        num_cached_tokens=2,
    )


def new_reader() -> Any:
    return HERMES.reader(TOOLS)


def call_text(arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"


answers = st.builds(
    lambda thought, text, calls: (
        (f"<think>{thought}</think>" if thought else "") + text + "\n".join(map(call_text, calls)),
        thought,
        text,
        calls,
    ),
    st.sampled_from(["", "hm, so", "é"]),
    st.sampled_from(["", "Hello", "a < b"]),
    st.lists(
        st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9) | st.text("aé", max_size=3)),
        max_size=3,
    ),
)


@given(answer=answers, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_reasoning_text_and_calls(answer: Any, cuts: list[int]) -> None:
    """Reasoning, text and calls of an answer come apart alike, whole and from any deltas."""
    text, thought, content, calls = answer
    result = to_chat_result(output_of(text), new_reader, "m")
    message: Any = result.generations[0].message
    assert message.content.strip() == content.strip()
    assert message.additional_kwargs == ({"reasoning_content": thought} if thought else {})
    assert [call["args"] for call in message.tool_calls] == calls
    assert message.usage_metadata["input_token_details"] == {"cache_read": 2}
    info = result.generations[0].generation_info
    assert info is not None
    assert info["finish_reason"] == ("tool_calls" if calls else "stop")
    kinds = ["reasoning"] * bool(thought) + ["text"] * bool(message.content)
    if hasattr(message, "content_blocks"):  # of langchain-core 1.0
        blocks = [block["type"] for block in message.content_blocks]
        assert blocks == kinds + ["tool_call"] * len(calls)

    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    builder = ChatChunkBuilder(new_reader(), "m")
    chunks = []
    for start, end in pairwise(bounds):
        chunks.append(builder.add(output_of(text[start:end], None)))
    chunks.append(builder.add(output_of("")))
    whole: Any = None
    for chunk in [*filter(None, chunks)]:
        whole = chunk if whole is None else whole + chunk
    assert whole.message.content == message.content
    assert whole.message.additional_kwargs == message.additional_kwargs
    assert [call["args"] for call in whole.message.tool_calls] == calls
    assert len({call["id"] for call in whole.message.tool_calls}) == len(calls)
    assert whole.message.usage_metadata == message.usage_metadata
    assert whole.generation_info == info
    once = whole_chunk(result)
    assert once.message.content == message.content
    assert [call["args"] for call in once.message.tool_calls] == calls  # type: ignore[attr-defined]


def test_calls_that_were_cut_are_invalid() -> None:
    """A call that ends with the last token is among the invalid ones, with what there is of it."""
    text = '<tool_call>\n{"name": "f", "arguments": {"x": '
    message: Any = to_chat_result(output_of(text, "length"), new_reader, "m").generations[0].message
    assert message.tool_calls == []
    [broken] = message.invalid_tool_calls
    assert (broken["name"], broken["args"]) == ("f", '{"x": ')
    assert broken["error"]
