"""Tools and their calls as the chat template writes them: what is trained is what is rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CALL_START = "<tool_call>\n"
CALL_END = "\n</tool_call>"
RESPONSE_START = "<tool_response>\n"
RESPONSE_END = "\n</tool_response>"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a tool.

    Attributes
    ----------
    name : str
    kind : str
        A JSON type.
    choices : tuple[str, ...]
        The allowed values, none for any.
    description : str
    required : bool
    """

    name: str
    kind: str = "string"
    choices: tuple[str, ...] = ()
    description: str = ""
    required: bool = True

    @property
    def brief(self) -> str:
        """The few words that stand for the parameter in a prompt."""
        brief = "|".join(self.choices) or self.kind
        brief += "" if self.required else "?"
        return f"{brief}: {self.description}" if self.description else brief

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema that a client sends."""
        schema: dict[str, Any] = {"type": self.kind}
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.description:
            schema["description"] = self.description
        return schema


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called."""

    name: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()

    @property
    def line(self) -> str:
        """The line that tells of the tool in a prompt."""
        told: dict[str, Any] = {"name": self.name}
        if self.description:
            told["description"] = self.description
        told["parameters"] = {parameter.name: parameter.brief for parameter in self.parameters}
        return json.dumps(told, ensure_ascii=False)

    @property
    def function(self) -> dict[str, Any]:
        """The tool in OpenAI's format."""
        schema = {
            "type": "object",
            "properties": {parameter.name: parameter.schema for parameter in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
        }
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The call as the model writes it."""
        told = {"name": self.name, "arguments": dict(self.arguments)}
        return f"{CALL_START}{json.dumps(told, ensure_ascii=False)}{CALL_END}"


def tools_text(tools: Sequence[Tool], system: str = "") -> str:
    """Write the system turn: what the system message says, then a line per tool."""
    lines = "".join(f"{tool.line}\n" for tool in tools)
    return f"{system}\n\n<tools>\n{lines}</tools>" if system else f"<tools>\n{lines}</tools>"


def calls_text(calls: Sequence[Call]) -> str:
    """Write the assistant's turn that makes calls."""
    return "\n".join(call.text for call in calls)


def responses_text(responses: Sequence[str]) -> str:
    """Write the turn that brings what tools returned, in the order of the calls."""
    return "\n".join(f"{RESPONSE_START}{text}{RESPONSE_END}" for text in responses)


def parse_calls(text: str) -> list[Call] | None:
    """Read a turn that consists of calls, None when it does not.

    Returns
    -------
    list[Call] | None
        Never empty.
    """
    calls = []
    for piece in text.strip().split(CALL_END.strip()):
        if not piece.strip():
            continue
        body = piece.strip().removeprefix(CALL_START.strip())
        try:
            told = json.loads(body)
            calls.append(Call(told["name"], told["arguments"]))
        except (ValueError, TypeError, KeyError):
            return None
    return calls if calls and text.strip().endswith(CALL_END.strip()) else None
