"""CallObject: a tool call written as a JSON object, read as its text comes."""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Final

from quire.chat.json_scanner import JsonScanner
from quire.chat.tool_parsers.interface import Arguments, CallStart, Event

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")


class _At(Enum):
    """What may come next."""

    OPEN = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA_OR_END = auto()
    DONE = auto()
    FAILED = auto()


class CallObject:
    """Read ``{"name": …, "arguments": {…}}`` in pieces of any size.

    The members may come in any order, and others than these are read over. Arguments are also
    found under ``"parameters"``; null is an object without members, and a string that holds the
    JSON of an object is that object. The call *starts* once the name is known and its arguments
    have begun as an object should: from then on they are handed out as they come.

    Parameters
    ----------
    needs_arguments : bool, default False
        Whether an object without arguments is no call, rather than one without arguments.

    Attributes
    ----------
    started : bool
    has_arguments : bool
        Whether the arguments are whole, or were not needed.
    """

    def __init__(self, needs_arguments: bool = False) -> None:
        self._needs_arguments = needs_arguments
        self._at = _At.OPEN
        self._scanner = JsonScanner()
        self._key = ""
        self._value: list[str] = []
        self._name: str | None = None
        self._arguments: str | None = None
        self._streams = False
        self.started = False
        self.has_arguments = False

    @property
    def done(self) -> bool:
        """Whether the object is whole."""
        return self._at is _At.DONE

    @property
    def failed(self) -> bool:
        """Whether it turned out to be no call. If it started before that, it stays one."""
        return self._at is _At.FAILED

    def feed(self, text: str, events: list[Event]) -> int:
        """Read on, as far as the object goes.

        Parameters
        ----------
        text : str
        events : list of Event
            To which is appended what there is to be told.

        Returns
        -------
        int
            Where the object ends, or where it failed; the length of the text if it did neither.
        """
        at, end = 0, len(text)
        while at < end and not self.done and not self.failed:
            if self._at is _At.VALUE:
                at = self._read_value(text, at, events)
                continue
            if self._at is not _At.KEY or not self._value:
                at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
                if at == end:
                    break
            at = self._read_syntax(text, at, events)
        return at

    def _read_syntax(self, text: str, at: int, events: list[Event]) -> int:
        char = text[at]
        if self._at is _At.OPEN:
            self._at = _At.KEY_OR_END if char == "{" else _At.FAILED
        elif self._at is _At.COLON:
            self._at = _At.VALUE if char == ":" else _At.FAILED
            self._begin()
        elif self._at is _At.COMMA_OR_END and char == ",":
            self._at = _At.KEY
            self._begin()
        elif self._at in (_At.COMMA_OR_END, _At.KEY_OR_END) and char == "}":
            self._close(events)
        elif self._at in (_At.KEY, _At.KEY_OR_END) and (self._value or char == '"'):
            self._at = _At.KEY
            return self._read_key(text, at)
        else:
            self._at = _At.FAILED
        return at if self._at is _At.FAILED else at + 1

    def _begin(self) -> None:
        self._scanner = JsonScanner()
        self._value = []

    def _read_key(self, text: str, at: int) -> int:
        at = self._scanner.feed(text, at)
        self._value.append(self._scanner.take())
        if self._scanner.failed:
            self._at = _At.FAILED
        elif self._scanner.done:
            self._key = json.loads("".join(self._value))
            self._at = _At.COLON
        return at

    def _read_value(self, text: str, at: int, events: list[Event]) -> int:
        if not self._value:
            at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
            if at == len(text):
                return at
            self._streams = self._begins_arguments(text[at])
        at = self._scanner.feed(text, at)
        piece = self._scanner.take()
        self._value.append(piece)
        if self._streams and self._name is not None:
            if not self.started:
                self._start(events)
            if piece:
                events.append(Arguments(piece))
        if self._scanner.failed:
            self._at = _At.FAILED
        elif self._scanner.done:
            self._at = _At.COMMA_OR_END if self._take_value(events) else _At.FAILED
        return at

    def _begins_arguments(self, char: str) -> bool:
        return char == "{" and self._holds_arguments()

    def _holds_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS and not self.has_arguments

    def _take_value(self, events: list[Event]) -> bool:
        """Take in a member that is whole; return whether it can be part of a call."""
        value = "".join(self._value)
        if self._key == "name" and not self.started:
            name = json.loads(value)
            if not isinstance(name, str) or not name.strip():
                return False
            self._name = name.strip()
        elif self._holds_arguments():
            if not self.started:
                self._arguments = value if self._streams else _object_of(value)
                if self._arguments is None:
                    return False
            self.has_arguments = True
        if self._name is not None and self.has_arguments and not self.started:
            self._start(events)
            events.append(Arguments(self._arguments or "{}"))
        return True

    def _start(self, events: list[Event]) -> None:
        assert self._name is not None
        self.started = True
        events.append(CallStart(self._name))

    def _close(self, events: list[Event]) -> None:
        if self._name is None or (self._needs_arguments and not self.has_arguments):
            self._at = _At.FAILED
            return
        if not self.started:
            self._start(events)
            events.append(Arguments("{}"))
        self.has_arguments = True
        self._at = _At.DONE


def _object_of(value: str) -> str | None:
    """Return the JSON object that a value stands for."""
    if value == "null":
        return "{}"
    if not value.startswith('"'):
        return None
    inner: str = json.loads(value).strip()
    if not inner:
        return "{}"
    scanner = JsonScanner()
    if not inner.startswith("{") or scanner.feed(inner) < len(inner) or not scanner.done:
        return None
    return scanner.take()
