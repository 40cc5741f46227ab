"""Conversations as clients of OpenAI's API write them, made what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from quire.errors import InvalidRequestError
from quire.utils.checks import refuse

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Types of content parts that are text, with the field that holds it."""

_REASONING: Final = ("reasoning_content", "reasoning")
_DROPPED: Final = ("refusal", "annotations", "audio", "function_call", "tool_calls", "content")
"""Fields that are not handed on as they are."""


def template_messages(messages: Any) -> list[dict[str, Any]]:
    """Check messages as OpenAI's chat API has them, and write them as chat templates expect them.

    The role ``developer`` becomes ``system``. Content in parts of text becomes one text, a line
    for each part. The arguments of a tool call become the dict that they are JSON of; those that
    are none, as of a call that was cut, stay the text that they are. Fields that are None are
    left out, and fields that are not known here are handed on to the template.

    Parameters
    ----------
    messages : list of dict

    Returns
    -------
    list of dict

    Raises
    ------
    InvalidRequestError
        A message that is malformed, or that holds what this engine does not read, such as an
        image. The text names the place, as ``messages[2].content[0].type``.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        expected = "a list of dicts such as {'role': 'user', 'content': 'Hello'}"
        raise refuse("messages", messages, expected)
    written = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if not written:
        raise refuse("messages", [], "a list of at least one message")
    return written


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise refuse(where, message, "a dict such as {'role': 'user', 'content': 'Hello'}")
    role = message.get("role")
    if role not in _ROLES:
        expected = f"one of {', '.join(map(repr, _ROLES))}"
        if role == "function":
            expected += " (the role 'function' was replaced by 'tool')"
        raise refuse(f"{where}.role", role, expected)
    written: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if role == "assistant":
        written.update(_answer(where, message))
    else:
        _only_for_assistants(where, role, message)
        content = message.get("content")
        if content is None:
            raise refuse(f"{where}.content", None, "a string or a list of parts of text")
        written["content"] = _text(f"{where}.content", content)
    if role == "tool":
        call = message.get("tool_call_id")
        if call is not None and not isinstance(call, str):
            raise refuse(f"{where}.tool_call_id", call, "the id of the call that this answers")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise refuse(f"{where}.name", name, "a string")
    for key, value in message.items():
        if value is not None and key not in written and key not in _DROPPED:
            written[key] = value
    return written


def _only_for_assistants(where: str, role: Any, message: Mapping[str, Any]) -> None:
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise refuse(f"{where}.{key}", message[key], f"absent from a message of role {role!r}")


def _answer(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content, the reasoning and the calls of an assistant's message."""
    for key in ("audio", "function_call"):
        if message.get(key) is not None:
            instead = "; functions are called by tool_calls" if key == "function_call" else ""
            raise refuse(f"{where}.{key}", message[key], f"None{instead}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise refuse(f"{where}.tool_calls", calls, "a list of calls")
    written: dict[str, Any] = {}
    reasoning = next((key for key in _REASONING if message.get(key) is not None), None)
    if reasoning is not None and not isinstance(message[reasoning], str):
        raise refuse(f"{where}.{reasoning}", message[reasoning], "a string")
    if content is None:
        refusal = message.get("refusal")
        if refusal is not None and not isinstance(refusal, str):
            raise refuse(f"{where}.refusal", refusal, "a string")
        if refusal is None and not calls and reasoning is None:
            raise refuse(f"{where}.content", None, "a text where there are no tool_calls")
        content = refusal or ""  # many templates write out what they find here
    written["content"] = _text(f"{where}.content", content)
    if calls:
        written["tool_calls"] = [
            _call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)
        ]
    return written


def _call(where: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise refuse(where, call, "a dict with id, type and function")
    if call.get("type", "function") != "function":
        raise refuse(f"{where}.type", call["type"], "'function'")
    id_ = call.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise refuse(f"{where}.id", id_, "a string")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise refuse(f"{where}.function", function, "a dict with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise refuse(f"{where}.function.name", name, "the name of a function")
    arguments = _arguments(f"{where}.function.arguments", function.get("arguments"))
    written: dict[str, Any] = {} if id_ is None else {"id": id_}
    return {**written, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(where: str, arguments: Any) -> Any:
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not isinstance(arguments, str):
        raise refuse(where, arguments, "JSON of an object, as a string")
    if not arguments.strip():
        return {}
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return read if isinstance(read, dict) else arguments


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise refuse(where, content, "a string or a list of parts of text")
    return "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise refuse(where, part, "a part such as {'type': 'text', 'text': 'Hello'}")
    kind = part.get("type")
    field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise InvalidRequestError(
            f"{where}.type must be 'text', got {kind!r}: this engine reads text, and neither "
            "images nor sound nor files"
        )
    text = part.get(field)
    if not isinstance(text, str):
        raise refuse(f"{where}.{field}", text, "a string")
    return text
