"""The tools of a request, and which of them a model may or must call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from quire.errors import InvalidRequestError
from quire.utils.checks import refuse

_NAME: Final = re.compile(r"[^\s\"'\\<>{}\[\]\x00-\x1f]{1,256}")


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes
    ----------
    name : str
    description : str or None
    parameters : dict
        The JSON schema of its arguments.
    strict : bool
        Whether a call's arguments have to match it whatever else is asked for.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a model may call.

    Attributes
    ----------
    tools : tuple of Tool
        Those that may be called.
    required : bool
        Whether one has to be.
    single : bool
        Whether it is one call of a function that was named.
    """

    tools: tuple[Tool, ...] = ()
    required: bool = False
    single: bool = False


def read_tools(tools: Any) -> list[Tool]:
    """Check tools as OpenAI's chat or responses API has them.

    Raises
    ------
    InvalidRequestError
        One that is no function, or that has the name of another; the message says where.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise refuse("tools", tools, "a list of functions")
    read = [_read_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    seen: dict[str, int] = {}
    for i, tool in enumerate(read):
        if tool.name in seen:
            raise refuse(
                f"tools[{i}].function.name",
                tool.name,
                f"another than that of tools[{seen[tool.name]}]",
            )
        seen[tool.name] = i
    return read


def _read_tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, Mapping):
        raise refuse(where, tool, "a dict with type 'function'")
    kind = tool.get("type", "function")
    if kind != "function":
        raise refuse(f"{where}.type", kind, "'function', the only kind of tool that there is here")
    nested = "name" not in tool or "function" in tool
    function = tool.get("function") if nested else tool
    if nested:
        where = f"{where}.function"
    if not isinstance(function, Mapping):
        raise refuse(where, function, "a dict with the function's name and parameters")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refuse(f"{where}.name", name, "a name without whitespace, quotes and brackets")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise refuse(f"{where}.description", description, "a string")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise refuse(f"{where}.strict", strict, "True, False or None")
    return Tool(name, description, _read_parameters(where, function), bool(strict))


def _read_parameters(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}}
    where = f"{where}.parameters"
    if not isinstance(schema, Mapping):
        raise refuse(where, schema, "a JSON schema of an object, as a dict")
    kind = schema.get("type", "object")
    if kind != "object":
        raise refuse(f"{where}.type", kind, "'object': a function's arguments have names")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where} must be JSON: {error}") from None
    return plain


def template_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Check tools, and write them as chat templates expect them.

    Parameters
    ----------
    tools : list of dict or None
        As in OpenAI's chat API, or in its responses API.

    Returns
    -------
    list of dict or None
        Each with ``type`` and ``function``, which has ``name``, ``description`` where there is
        one, and ``parameters``. None where there are no tools.

    Raises
    ------
    InvalidRequestError
        One that is no function, or that has the name of another; the message says where.
    """
    described = []
    for tool in read_tools(tools):
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.parameters
        described.append({"type": "function", "function": function})
    return described or None


def read_tool_choice(choice: Any, tools: list[Tool]) -> ToolChoice:
    """Check a choice among tools.

    Parameters
    ----------
    choice : str, dict or None
        ``"auto"``, ``"none"``, ``"required"``, a named function, or a choice among some
        (``"allowed_tools"``), in the form of the chat API or of the responses API. None is
        ``"auto"``.
    tools : list of Tool

    Raises
    ------
    InvalidRequestError
        It is none of these, or names a function that is not there.
    """
    if choice is None or choice == "auto":
        return ToolChoice(tuple(tools))
    if choice == "none":
        return ToolChoice()
    if choice == "required":
        if not tools:
            raise refuse("tool_choice", choice, "'auto' or 'none' without tools")
        return ToolChoice(tuple(tools), required=True)
    expected = "'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}"
    if not isinstance(choice, Mapping):
        raise refuse("tool_choice", choice, expected)
    if choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        if not isinstance(inner, Mapping) or inner.get("mode") not in ("auto", "required"):
            raise refuse("tool_choice.allowed_tools.mode", inner, "'auto' or 'required'")
        named = inner.get("tools")
        if not isinstance(named, (list, tuple)) or not named:
            raise refuse("tool_choice.allowed_tools.tools", named, "a list of tools")
        allowed = tuple(_named("tool_choice.allowed_tools.tools", item, tools) for item in named)
        return ToolChoice(allowed, required=inner["mode"] == "required")
    if choice.get("type") != "function":
        raise refuse("tool_choice", choice, expected)
    return ToolChoice((_named("tool_choice", choice, tools),), required=True, single=True)


def _named(where: str, choice: Any, tools: list[Tool]) -> Tool:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        names = ", ".join(repr(tool.name) for tool in tools)
        raise refuse(where, choice, f"a function of tools ({names})" if names else "absent")
    return found
