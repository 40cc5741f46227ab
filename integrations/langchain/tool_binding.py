"""Tools and the choice among them, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from quire.errors import InvalidRequestError
from quire.integrations.langchain.recursive_schemas import recursive_schema
from quire.utils.checks import refuse

ToolLike = dict[str, Any] | type | Callable[..., Any] | BaseTool | Runnable[Any, Any]
"""What :func:`openai_tools` takes for a tool."""

_CHOICES = {"any": "required", "required": "required", "auto": "auto", "none": "none"}


def openai_tools(tools: Sequence[ToolLike], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Return tools as dicts with ``type`` and ``function``.

    Parameters
    ----------
    tools : list
        Pydantic models and TypedDicts, functions with type hints, dicts in OpenAI's or
        Anthropic's shape or JSON schemas with a title, LangChain's tools, and runnables, which
        become tools by their ``as_tool``.
    strict : bool, optional
        Set in each function; see :class:`quire.chat.ChatFormat`.

    Raises
    ------
    InvalidRequestError
        For what is no tool, named by its index.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise refuse("tools", tools, "a list of tools")
    converted = []
    for i, tool in enumerate(tools):
        try:
            if isinstance(tool, Runnable) and not isinstance(tool, BaseTool):
                tool = tool.as_tool()
            entry = convert_to_openai_tool(tool, strict=strict)
            function = entry["function"]
            _ = function["name"]
            if isinstance(tool, Mapping) and _is_lost(tool, function):
                raise ValueError("a tool's arguments are an object, with properties")
            recursive = recursive_schema(getattr(tool, "tool_call_schema", tool))
        except Exception as error:  # of several kinds, by what the tool is
            raise InvalidRequestError(f"tools[{i}] is no tool: {error}") from error
        if recursive is not None:
            inner = {k: v for k, v in recursive.items() if k not in ("title", "description")}
            function["parameters"] = inner
        converted.append(entry)
    return converted


def _is_lost(schema: Mapping[str, Any], function: Mapping[str, Any]) -> bool:
    """Whether a JSON schema was taken for a function without arguments, as is one of an array."""
    words = {"title", "description", "strict"}
    return "title" in schema and "parameters" not in function and not words.issuperset(schema)


def openai_tool_choice(
    choice: str | bool | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]
) -> str | dict[str, Any] | None:
    """Return a choice among tools as ``auto``, ``none``, ``required`` or the dict of a function.

    Parameters
    ----------
    choice : str, bool or dict, optional
        ``"any"``, ``"required"`` or True: at least one call; ``"none"`` or False: no call;
        ``"auto"``: as the model likes; a tool's name, or a dict that has it: a call of that tool.
    tools : list of dict
        As :func:`openai_tools` returns them.

    Raises
    ------
    InvalidRequestError
        For any other, and for a name that no tool has.
    """
    if choice is None:
        return None
    if isinstance(choice, bool):
        return "required" if choice else "none"
    names = [tool["function"]["name"] for tool in tools]
    name: Any = choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if name is None:
            name = choice.get("type")
    if isinstance(name, str):
        if name in names:
            return {"type": "function", "function": {"name": name}}
        if name in _CHOICES:
            return _CHOICES[name]
    expected = f"one of {', '.join(map(repr, [*_CHOICES, *names]))}, True or False"
    raise refuse("tool_choice", choice, expected)
