"""Calls as Llama 3 models write them: an answer that is JSON, with ``name`` and ``parameters``."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import ClassVar, Final

from quire.chat.call_object import CallObject
from quire.chat.lark import lark_json, lark_string
from quire.chat.tool_parsers.interface import Arguments, Event, Function, Text
from quire.chat.tool_parsers.stepped_reader import SteppedReader

_TAG: Final = "<|python_tag|>"
_SUITS: Final = re.compile(r'\\?"name\\?": ?function name, ?\\?"parameters\\?"')
_BETWEEN: Final = re.compile(r"[\s;}]*")


class Llama3JsonToolParser:
    """See :class:`quire.chat.tool_parsers.interface.ToolParser`."""

    name: ClassVar[str] = "llama3_json"
    is_json: ClassVar[bool] = True
    markers: tuple[str, ...] = ()  # nothing is lost without the tag

    def __init__(self, template: str) -> None:
        pass

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template writes calls this way."""
        return _SUITS.search(template) is not None

    def reader(self, parallel: bool) -> Llama3JsonReader:
        """Return a reader."""
        return Llama3JsonReader(parallel)

    def call_id(self) -> str:
        """Return a new id for a call."""
        return f"call_{secrets.token_hex(12)}"

    def template_id(self, id_: str) -> str:
        """Return an id as it is."""
        return id_

    def grammar(
        self, functions: Sequence[Function], literal: Callable[[str], str], parallel: bool
    ) -> str:
        """Return rules for calls."""
        lines = [
            "calls: call" + (' ("; " call)*' if parallel else ""),
            f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}",
        ]
        for i, (name, schema) in enumerate(functions):
            opening = lark_string(f'{{"name": {json.dumps(name)}, "parameters": ')
            lines.append(f'call_{i}: {opening} {lark_json(schema)} "}}"')
        return "\n".join(
            [*lines, "free: calls | other", r"other: /\s*([^{\s<](.|\n)*|<([^|](.|\n)*)?)?/"]
        )


class _In(Enum):
    """Where a reader is."""

    START = auto()
    CALL = auto()
    BEHIND = auto()
    BROKEN = auto()
    TEXT = auto()


class Llama3JsonReader(SteppedReader):
    """See :class:`quire.chat.tool_parsers.interface.ToolReader`.

    The text has to begin with a call; several stand behind each other, mostly with ``;`` between
    them. An object that has no parameters is an answer in JSON. Arguments that turn out to be no
    JSON after they began are all the rest of the text.
    """

    def __init__(self, parallel: bool) -> None:
        super().__init__(_In.START)
        self._parallel = parallel
        self._call = CallObject(needs_arguments=True)

    def feed(self, text: str) -> list[Event]:
        """Read more text; return what is sure."""
        return [Text(text)] if self._in is _In.TEXT else super().feed(text)

    def finish(self) -> list[Event]:
        """Return what was held back."""
        rest, self._rest = self._held + self._rest, ""
        self._held = ""
        return [] if not rest or self._in is _In.BEHIND else [Text(rest)]

    # Each step returns whether there may be more to read.

    def _read_start(self, events: list[Event]) -> bool:
        text = self._rest.lstrip()
        if text.startswith(_TAG):
            text = text[len(_TAG) :].lstrip()
        if _TAG.startswith(text):
            return False
        if text.startswith("{"):
            self._hold(len(self._rest) - len(text))
            self._in = _In.CALL
        else:
            self._in = _In.TEXT
        return True

    def _hold(self, count: int) -> None:
        self._held += self._rest[:count]
        self._rest = self._rest[count:]

    def _read_call(self, events: list[Event]) -> bool:
        call = self._call
        self._hold(call.feed(self._rest, events))
        if call.started:
            self._held = ""
        if not call.done and not call.failed:
            return False
        if not call.started:
            self._in = _In.TEXT
            self._rest, self._held = self._held + self._rest, ""
        else:
            self._in = _In.BEHIND if call.has_arguments else _In.BROKEN
        return True

    def _read_behind(self, events: list[Event]) -> bool:
        at = _BETWEEN.match(self._rest).end()  # type: ignore[union-attr]
        if at == len(self._rest):
            return False
        if self._rest[at] == "{" and self._parallel:
            self._hold(at)
            self._call = CallObject(needs_arguments=True)
            self._in = _In.CALL
        else:
            self._in = _In.TEXT
        return True

    def _read_broken(self, events: list[Event]) -> bool:
        events.append(Arguments(self._rest))
        self._rest = ""
        return False

    def _read_text(self, events: list[Event]) -> bool:
        events.append(Text(self._rest))
        self._rest = ""
        return False

    steps: ClassVar = {
        _In.START: _read_start,
        _In.CALL: _read_call,
        _In.BEHIND: _read_behind,
        _In.BROKEN: _read_broken,
        _In.TEXT: _read_text,
    }
