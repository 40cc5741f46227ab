"""What a model's answer is made of: text, reasoning and tool calls, whole or bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ToolCall:
    """A call of a function that the model asks for.

    Attributes
    ----------
    id : str
        What the answer to the call refers to it by.
    name : str
        The function, which need not be one of those that were offered.
    arguments : str
        JSON text of an object; less where the completion was cut in the middle of it, and what
        the model wrote instead where that turned out to be no JSON.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """What is new of a tool call.

    Attributes
    ----------
    index : int
        Which of the message's calls this is about.
    id, name : str or None
        In the first delta of a call only.
    arguments : str
        What is to be appended to the call's arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class ChatDelta:
    """What is new of a message; false where nothing is.

    Attributes
    ----------
    content, reasoning : str
    tool_calls : list of ToolCallDelta
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


@dataclass(frozen=True)
class ChatMessage:
    """A model's answer.

    Attributes
    ----------
    content : str or None
        None where there are tool calls and no text beside them.
    reasoning : str or None
        What the model thought before it answered; None where it did not.
    tool_calls : list of ToolCall
    """

    content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
