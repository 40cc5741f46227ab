"""The input of ``/v1/responses``, as the messages and tools of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.server.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


def chat_messages(given: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Return the messages that a request's input stands for.

    Parameters
    ----------
    given : str or list
        A text of the user, or items: messages, calls of functions and what these returned, and
        reasoning, which goes with the answer that follows it.
    instructions : str or None
        What the conversation begins with.

    Raises
    ------
    ApiError
        400, with the item's place.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    reasoning: str | None = None
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, Mapping):
            raise _refuse(where, "an object", item)
        kind = item.get("type", "message")
        read = _READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise _refuse(f"{where}.type", f"one of {', '.join(_READERS)}", kind)
        message = read(item, where)
        if message["role"] == "reasoning":
            reasoning = message["content"]
            continue
        if message["role"] == "assistant" and reasoning is not None:
            message["reasoning_content"] = reasoning
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant":
            # A turn of the assistant is one message: what it said, and all that it called.
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
        reasoning = None
    return messages


def chat_tools(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Return tools in the form of a chat's.

    Raises
    ------
    ApiError
        400, for a tool that OpenAI would run and nobody here can.
    """
    if tools is None:
        return None
    found = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise _refuse(f"tools[{i}].type", "'function': no other tool runs here", kind)
        function = {k: v for k, v in tool.items() if k != "type" and v is not None}
        found.append({"type": "function", "function": function})
    return found


def chat_tool_choice(choice: Any) -> Any:
    """Return a tool choice in the form of a chat's.

    Raises
    ------
    ApiError
        400, for one that cannot be honoured.
    """
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise _refuse("tool_choice.type", "'function'", choice.get("type"))
    return {"type": "function", "function": {"name": choice.get("name")}}


def response_format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``text.format`` of a request as a chat's ``response_format``."""
    if form is None:
        return None
    if form.get("type") != "json_schema":
        return dict(form)
    schema = {k: form[k] for k in ("name", "schema", "strict", "description") if k in form}
    return {"type": "json_schema", "json_schema": schema}


# -- items ---------------------------------------------------------------------------------------


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise _refuse(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    return {"role": role, "content": _text(item.get("content"), f"{where}.content")}


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = {name: _string(item, name, where) for name in ("name", "arguments")}
    call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _call_output(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = _text(item.get("output"), f"{where}.output")
    return {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": content}


def _reasoning(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise _refuse(f"{where}.content", "a list", parts)
    texts = [
        _string(part, "text", f"{where}.content[{i}]")
        for i, part in enumerate(parts)
        if isinstance(part, Mapping)
    ]
    return {"role": "reasoning", "content": "\n".join(texts)}


_READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "reasoning": _reasoning,
}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _refuse(where, "a text or a list of parts", content)
    texts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if not isinstance(part, Mapping):
            raise _refuse(place, "an object", part)
        if part.get("type") not in _TEXT_PARTS:
            raise _refuse(f"{place}.type", "'input_text': the model reads text", part.get("type"))
        name = "refusal" if part["type"] == "refusal" else "text"
        texts.append(_string(part, name, place))
    return "".join(texts)


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _refuse(f"{where}.{name}", "a string", value)
    return value


def _refuse(param: str, expected: str, got: Any) -> ApiError:
    shown = repr(got)
    if len(shown) > 200:
        shown = shown[:200] + "..."
    return ApiError(400, f"{param} must be {expected}, got {shown}", param=param)
