"""JsonScanner: one JSON value, read as its text comes."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER_TEXT: Final = re.compile(r"[-+.eE0-9]+")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS: Final = {"t": "true", "f": "false", "n": "null"}
_ESCAPES: Final = frozenset('"\\/bfnrtu')
_CONTROL: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
_HEX: Final = frozenset("0123456789abcdefABCDEF")


class _At(Enum):
    """What may come next."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    WORD = auto()
    DONE = auto()
    FAILED = auto()


_EMPTY: Final = (("}", _At.KEY_OR_END), ("]", _At.VALUE_OR_END))
"""What ends a container in which there is nothing."""


class JsonScanner:
    """Read one JSON value in pieces of any size.

    Control characters within strings, which JSON forbids and models write all the same, are
    escaped; all else is taken as it is.
    """

    def __init__(self) -> None:
        self._at = _At.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._word = ""  # what is left of a word, or the number so far
        self._digits = 0
        self._out: list[str] = []

    @property
    def done(self) -> bool:
        """Whether the value is whole. What ends a number is the character behind it."""
        return self._at is _At.DONE

    @property
    def failed(self) -> bool:
        """Whether it turned out to be no JSON."""
        return self._at is _At.FAILED

    def take(self) -> str:
        """Return the text of the value that was read since the last call."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def feed(self, text: str, start: int = 0) -> int:
        """Read on, as far as the value goes.

        Parameters
        ----------
        text : str
        start : int, default 0
            Where in it to begin.

        Returns
        -------
        int
            Where the value ends, or where the character stands that cannot follow; the length
            of the text if neither was met.
        """
        at, end = start, len(text)
        while at < end:
            state = self._at
            if state is _At.DONE or state is _At.FAILED:
                return at
            if state is _At.STRING:
                at = self._read_string(text, at)
            elif state is _At.NUMBER:
                at = self._read_number(text, at)
            elif state in (_At.ESCAPE, _At.HEX, _At.WORD):
                at = self._read_one(text, at)
            else:
                behind = _BLANK.match(text, at).end()  # type: ignore[union-attr]
                self._out.append(text[at:behind])
                at = behind
                if at < end:
                    at = self._read_mark(text[at], at)
        return at

    def _read_string(self, text: str, at: int) -> int:
        found = _PLAIN.match(text, at)
        if found is not None:
            self._out.append(found[0])
            at = found.end()
            if at == len(text):
                return at
        char = text[at]
        if char == '"':
            self._out.append(char)
            self._at = _At.COLON if self._is_key else self._behind_value()
        elif char == "\\":
            self._out.append(char)
            self._at = _At.ESCAPE
        else:
            self._out.append(_CONTROL.get(char) or f"\\u{ord(char):04x}")
        return at + 1

    def _read_one(self, text: str, at: int) -> int:
        """Read a character of an escape or of a word."""
        char = text[at]
        if self._at is _At.WORD:
            fits = char == self._word[0]
            self._word = self._word[1:]
            following = _At.WORD if self._word else self._behind_value()
        elif self._at is _At.ESCAPE:
            fits = char in _ESCAPES
            self._digits = 4
            following = _At.HEX if char == "u" else _At.STRING
        else:
            fits = char in _HEX
            self._digits -= 1
            following = _At.HEX if self._digits else _At.STRING
        if not fits:
            self._at = _At.FAILED
            return at
        self._out.append(char)
        self._at = following
        return at + 1

    def _read_number(self, text: str, at: int) -> int:
        found = _NUMBER_TEXT.match(text, at)
        if found is not None:
            self._word += found[0]
            self._out.append(found[0])
            return found.end()
        whole = _NUMBER.fullmatch(self._word) is not None
        self._at = self._behind_value() if whole else _At.FAILED
        return at

    def _read_mark(self, char: str, at: int) -> int:
        """Read the character that a value, or what stands between values, begins with."""
        state = self._at
        if (char, state) in _EMPTY:
            self._close()
        elif state is _At.COMMA_OR_END:
            if char == ",":
                self._at = _At.KEY if self._open[-1] == "}" else _At.VALUE
            elif char == self._open[-1]:
                self._close()
            else:
                self._at = _At.FAILED
        elif state is _At.COLON:
            self._at = _At.VALUE if char == ":" else _At.FAILED
        elif state in (_At.KEY, _At.KEY_OR_END):
            self._is_key = True
            self._at = _At.STRING if char == '"' else _At.FAILED
        else:
            self._begin_value(char)
        if self._at is _At.FAILED:
            return at
        self._out.append(char)
        return at + 1

    def _begin_value(self, char: str) -> None:
        if char == "{":
            self._open.append("}")
            self._at = _At.KEY_OR_END
        elif char == "[":
            self._open.append("]")
            self._at = _At.VALUE_OR_END
        elif char == '"':
            self._is_key = False
            self._at = _At.STRING
        elif char in _WORDS:
            self._word = _WORDS[char][1:]
            self._at = _At.WORD
        elif char == "-" or char in "0123456789":
            self._word = char
            self._at = _At.NUMBER
        else:
            self._at = _At.FAILED

    def _close(self) -> None:
        self._open.pop()
        self._at = self._behind_value()

    def _behind_value(self) -> _At:
        return _At.COMMA_OR_END if self._open else _At.DONE
