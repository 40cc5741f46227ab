"""SteppedReader: what the readers of calls have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar

from quire.chat.tool_parsers.interface import Event


class SteppedReader:
    """Reads as far as it can, by the step for where it is.

    A subclass has ``steps``: per place a method that reads some of ``_rest``, adds to a list of
    events what is sure, and returns whether there may be more to read.
    """

    steps: ClassVar[Mapping[Any, Callable[[Any, list[Event]], bool]]]

    def __init__(self, start: Enum) -> None:
        self._in = start
        self._rest = ""  # not yet read
        self._held = ""  # what was read of a call that has not started

    def feed(self, text: str) -> list[Event]:
        """Read more text; return what is sure."""
        self._rest += text
        events: list[Event] = []
        while self._rest and self.steps[self._in](self, events):
            pass
        return events
