"""LangChain's messages as the dicts in OpenAI's shape that chat templates are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from quire.errors import InvalidRequestError
from quire.utils.checks import shown

_TEXT_BLOCKS = frozenset({"text", "input_text", "output_text"})
_REASONING_BLOCKS = {"reasoning": "reasoning", "thinking": "thinking"}
_CALL_ARGUMENTS = {"tool_call": "args", "tool_use": "input"}
_REPEATED_BLOCKS = frozenset({"tool_call_chunk", "invalid_tool_call", "input_json_delta"})
"""Blocks of an answer whose content stands in the message's own fields, too."""


def openai_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's shape.

    Parameters
    ----------
    messages : list of BaseMessage

    Returns
    -------
    list of dict
        One per message, with ``role``, ``content`` and, where there are any, ``name``,
        ``tool_calls``, ``tool_call_id`` and ``reasoning_content``.

    Raises
    ------
    InvalidRequestError
        For a message of a kind that no model is given, and for content that is no text; it is
        named as ``messages[i].content[j]``.
    """
    return [_converted(f"messages[{i}]", message) for i, message in enumerate(messages)]


def text_of(message: BaseMessage) -> str:
    """Return the text of a message, joined where it comes in blocks."""
    content = message.content
    if isinstance(content, str):
        return content
    blocks = (block if isinstance(block, dict) else {"text": block} for block in content)
    return "".join(
        block["text"]
        for block in blocks
        if block.get("type", "text") in _TEXT_BLOCKS and isinstance(block.get("text"), str)
    )


def _converted(where: str, message: BaseMessage) -> dict[str, Any]:
    if isinstance(message, AIMessage):
        converted = _assistant(where, message)
    elif isinstance(message, ToolMessage):
        converted = {
            "role": "tool",
            "tool_call_id": message.tool_call_id,
            "content": _text_content(where, message),
        }
    else:
        converted = {"role": _role(where, message), "content": _text_content(where, message)}
    if message.name is not None:
        converted["name"] = message.name
    return converted


def _role(where: str, message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        # The mark that LangChain's conversion from OpenAI's shape leaves.
        role = message.additional_kwargs.get("__openai_role__", "system")
        return str(role)
    if isinstance(message, ChatMessage):
        return message.role
    raise InvalidRequestError(
        f"{where} is a {type(message).__name__}, which is no message for a chat model: give "
        "system, human, AI, tool or chat messages"
    )


def _text_content(where: str, message: BaseMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for j, block in enumerate(message.content):
        if isinstance(block, str):
            parts.append({"type": "text", "text": block})
        elif block.get("type", "text") in _TEXT_BLOCKS and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        else:
            raise _no_text(f"{where}.content[{j}]", block)
    return parts


def _no_text(where: str, block: dict[str, Any]) -> InvalidRequestError:
    kind = block.get("type")
    what = f"of type {kind!r}" if isinstance(kind, str) else shown(block)
    return InvalidRequestError(f"{where} is {what}: this model reads text only")


def _assistant(where: str, message: AIMessage) -> dict[str, Any]:
    every = [*message.tool_calls, *message.invalid_tool_calls]
    calls = [_openai_call(call.get("id"), call["name"], call["args"]) for call in every]
    known = {call["id"] for call in calls}
    texts: list[str] = []
    reasoning: list[str] = []
    content = [message.content] if isinstance(message.content, str) else message.content
    for j, block in enumerate(content):
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type", "text")
        if kind in _TEXT_BLOCKS and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind in _REASONING_BLOCKS:
            reasoning.append(str(block.get(_REASONING_BLOCKS[kind]) or ""))
        elif kind in _CALL_ARGUMENTS:
            if block.get("id") not in known:
                arguments = block.get(_CALL_ARGUMENTS[kind])
                calls.append(_openai_call(block.get("id"), block.get("name"), arguments))
        elif kind not in _REPEATED_BLOCKS:
            raise _no_text(f"{where}.content[{j}]", block)
    converted: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        converted["tool_calls"] = calls
    thought = "".join(reasoning) or message.additional_kwargs.get("reasoning_content")
    if thought:
        converted["reasoning_content"] = thought
    return converted


def _openai_call(call_id: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    # Those of an invalid call are the text that the model wrote.
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}
