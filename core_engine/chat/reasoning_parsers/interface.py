"""What a reasoning parser is."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol


class Split(NamedTuple):
    """Text that was read: what is reasoning of it, and what is the answer."""

    reasoning: str = ""
    answer: str = ""


class ReasoningReader(Protocol):
    """Reads the text of one completion; what it tells must not depend on how that was cut."""

    def feed(self, text: str) -> Split:
        """Read more text; return what is sure."""
        ...

    def finish(self) -> Split:
        """Return what was held back: nothing follows any more."""
        ...


class ReasoningParser(Protocol):
    """How a family of models writes what it thinks before it answers.

    A class that has these is offered by an entry point of group ``quire.reasoning_parsers`` under
    the name it is chosen by. It is made with the text of the model's chat template, ``""`` where
    that is not known.

    Attributes
    ----------
    name : str
    markers : tuple of str
        Texts it looks for that are special tokens in some tokenizers, which leave those out of
        the text unless they are told otherwise.
    """

    name: ClassVar[str]
    markers: tuple[str, ...]

    def __init__(self, template: str) -> None: ...

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template is of a model that thinks this way."""
        ...

    def reader(self, prompt: str) -> ReasoningReader:
        """Return a reader of what follows a prompt, of which the end will do."""
        ...

    def grammar(self, prompt: str, literal: Callable[[str], str]) -> tuple[str, str]:
        """Return how a grammar lets a model think behind a prompt.

        Parameters
        ----------
        prompt : str
        literal : callable
            Turns a text of ``markers`` into what a rule in Lark's notation has to have for it.

        Returns
        -------
        str
            What to put before the answer, such as ``"thought?"``; empty where nothing may be
            thought any more.
        str
            The rules that it names. A terminal ``TEXT``, for any text, is defined elsewhere.
        """
        ...
