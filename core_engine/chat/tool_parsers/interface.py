"""What a tool-call parser is: the protocol, and the events that its readers tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol


class Text(NamedTuple):
    """Text that is no part of a call."""

    text: str


class CallStart(NamedTuple):
    """A call has begun; it cannot be taken back."""

    name: str


class Arguments(NamedTuple):
    """More of the arguments of the call that began last."""

    text: str


Event = Text | CallStart | Arguments


class Function(NamedTuple):
    """A function that a grammar lets a model call.

    Attributes
    ----------
    name : str
    schema : dict
        The JSON schema that its arguments have to match.
    """

    name: str
    schema: dict[str, Any]


class ToolReader(Protocol):
    """Reads the text of one completion.

    Texts and arguments, put together, must not depend on how the text was cut into pieces, and
    what is no call has to come out as :class:`Text`, all of it.
    """

    def feed(self, text: str) -> list[Event]:
        """Read more text; return what is sure."""
        ...

    def finish(self) -> list[Event]:
        """Return what was held back: nothing follows any more."""
        ...


class ToolParser(Protocol):
    """How a family of models writes its tool calls.

    A class that has these is offered by an entry point of group ``quire.tool_parsers`` under the
    name it is chosen by. It is made with the text of the model's chat template, ``""`` where that
    is not known.

    Attributes
    ----------
    name : str
    markers : tuple of str
        Texts it looks for that are special tokens in some tokenizers, which leave those out of
        the text unless they are told otherwise.
    is_json : bool
        Whether calls are bare JSON, which nothing tells from an answer in JSON.
    """

    name: ClassVar[str]
    is_json: ClassVar[bool]
    markers: tuple[str, ...]

    def __init__(self, template: str) -> None: ...

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template writes calls this way."""
        ...

    def reader(self, parallel: bool) -> ToolReader:
        """Return a reader; without ``parallel``, all that follows a first call is text."""
        ...

    def call_id(self) -> str:
        """Return a new id for a call."""
        ...

    def template_id(self, id_: str) -> str:
        """Return an id, of whatever origin, as the chat template takes it."""
        ...

    def grammar(
        self, functions: Sequence[Function], literal: Callable[[str], str], parallel: bool
    ) -> str:
        """Return rules in Lark's notation.

        Parameters
        ----------
        functions : sequence of Function
            Those that may be called, at least one.
        literal : callable
            Turns a text of ``markers`` into what a rule has to have for it.
        parallel : bool
            Whether more than one call may be made.

        Returns
        -------
        str
            A rule ``calls``, for one or more calls and nothing else, and a rule ``free``, for any
            text in which what begins as a call is one; without ``parallel``, nothing follows it.
            A terminal ``TEXT``, for any text, is defined elsewhere.
        """
        ...
