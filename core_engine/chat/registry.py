"""The parsers by name: those that are here, and those of installed packages."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Final

from quire.chat.reasoning_parsers.interface import ReasoningParser
from quire.chat.tool_parsers.interface import ToolParser
from quire.errors import ConfigError
from quire.utils.suggest import nearest

TOOL_PARSER_GROUP: Final = "quire.tool_parsers"
"""A package offers tool-call parsers by entry points of this group, each a class."""

REASONING_PARSER_GROUP: Final = "quire.reasoning_parsers"
"""The same for reasoning parsers."""

_TOOL_PARSERS: Final = {
    "hermes": "hermes:HermesToolParser",
    "llama3_json": "llama3_json:Llama3JsonToolParser",
    "mistral": "mistral:MistralToolParser",
}
_TOOL_ALIASES: Final = {
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "qwen": "hermes",
    "qwen2": "hermes",
    "qwen2_5": "hermes",
    "qwen3": "hermes",
}
_REASONING_PARSERS: Final = {
    "deepseek_r1": "think:AlwaysThinkReasoningParser",
    "mistral": "think:BracketThinkReasoningParser",
    "think": "think:ThinkReasoningParser",
}
_REASONING_ALIASES: Final = {"qwen3": "think"}


def tool_parser_names() -> list[str]:
    """Names of tool-call parsers, sorted."""
    return sorted({*_TOOL_PARSERS, *_TOOL_ALIASES, *_installed(TOOL_PARSER_GROUP)})


def reasoning_parser_names() -> list[str]:
    """Names of reasoning parsers, sorted."""
    return sorted({*_REASONING_PARSERS, *_REASONING_ALIASES, *_installed(REASONING_PARSER_GROUP)})


def tool_parser_class(name: str) -> type[ToolParser]:
    """Return a tool-call parser.

    Raises
    ------
    ConfigError
        There is none of that name, or the package that offers it fails.
    """
    name = _TOOL_ALIASES.get(name, name)
    home = _TOOL_PARSERS.get(name)
    found: type[ToolParser] = (
        _attribute(f"quire.chat.tool_parsers.{home}")
        if home
        else _load(TOOL_PARSER_GROUP, name, "tool_parser", tool_parser_names())
    )
    return found


def reasoning_parser_class(name: str) -> type[ReasoningParser]:
    """Return a reasoning parser.

    Raises
    ------
    ConfigError
        There is none of that name, or the package that offers it fails.
    """
    name = _REASONING_ALIASES.get(name, name)
    home = _REASONING_PARSERS.get(name)
    found: type[ReasoningParser] = (
        _attribute(f"quire.chat.reasoning_parsers.{home}")
        if home
        else _load(REASONING_PARSER_GROUP, name, "reasoning_parser", reasoning_parser_names())
    )
    return found


def guess_tool_parser(template: str) -> type[ToolParser] | None:
    """Return the parser for which a chat template speaks, of those that are here."""
    classes = map(tool_parser_class, _TOOL_PARSERS)
    return next((item for item in classes if item.suits(template)), None)


def guess_reasoning_parser(template: str) -> type[ReasoningParser] | None:
    """Return the parser for which a chat template speaks, of those that are here."""
    classes = map(reasoning_parser_class, _REASONING_PARSERS)
    return next((item for item in classes if item.suits(template)), None)


def _attribute(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


@cache
def _installed(group: str) -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=group)}


def _load(group: str, name: str, what: str, names: list[str]) -> Any:
    point = _installed(group).get(name)
    if point is None:
        near = nearest(name, names)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{what} must be one of {', '.join(names)}, 'none', or None to go by the chat "
            f"template, got {name!r}{hint}"
        )
    try:
        found = point.load()
    except Exception as error:  # somebody else wrote it
        raise ConfigError(
            f"the {what} {name!r} ({point.value}) of an installed package could not be loaded: "
            f"{error}"
        ) from error
    if not isinstance(found, type) or not callable(getattr(found, "reader", None)):
        raise ConfigError(
            f"the entry point {name!r} of {group!r} must be a class with the methods of "
            f"quire.chat.{what}s.interface, got {found!r}"
        )
    return found
