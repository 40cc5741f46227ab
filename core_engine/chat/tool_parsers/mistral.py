"""Calls as models of Mistral AI write them, behind the token ``[TOOL_CALLS]``.

Older ones write a list of objects behind it, newer ones a name, ``[ARGS]`` and the arguments.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import ClassVar, Final

from quire.chat.call_object import CallObject
from quire.chat.held_text import beginning_of
from quire.chat.json_scanner import JsonScanner
from quire.chat.lark import lark_json, lark_string
from quire.chat.tool_parsers.interface import Arguments, CallStart, Event, Function, Text
from quire.chat.tool_parsers.stepped_reader import SteppedReader

_BEGIN: Final = "[TOOL_CALLS]"
_ARGS: Final = "[ARGS]"
_CALL_ID: Final = "[CALL_ID]"
_ALPHANUMERIC: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9
_ID: Final = re.compile(f"[{_ALPHANUMERIC}]{{{_ID_LENGTH}}}")

_LIST: Final = re.compile(r"\s*\[\s*(?=\{)")
_LIST_BEGINNING: Final = re.compile(r"\s*(\[\s*)?")
_NAMED: Final = re.compile(r"\s*([^\s\[\]{}\"]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_NAMED_BEGINNING: Final = re.compile(r"\s*[^\s\[\]{}\"]*\s*(?:\[[A-Z_]*(?:\]\s*\w*\s*)?){0,2}")
_LONGEST_HEAD: Final = 600
"""Most characters between the token and the arguments."""

_NEXT: Final = re.compile(r"[\s}]*,\s*(?=\{)")
_NEXT_BEGINNING: Final = re.compile(r"[\s}]*(,\s*)?")
_LAST: Final = re.compile(r"[\s}]*\]")


class MistralToolParser:
    """See :class:`quire.chat.tool_parsers.interface.ToolParser`."""

    name: ClassVar[str] = "mistral"
    is_json: ClassVar[bool] = False
    markers: tuple[str, ...] = (_BEGIN, _ARGS, _CALL_ID)

    def __init__(self, template: str) -> None:
        self._names_first = _ARGS in template
        self._has_ids = _CALL_ID in template

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template writes calls this way."""
        return _BEGIN in template

    def reader(self, parallel: bool) -> MistralReader:
        """Return a reader."""
        return MistralReader(parallel)

    def call_id(self) -> str:
        """Return a new id for a call."""
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_ID_LENGTH))

    def template_id(self, id_: str) -> str:
        """Return an id of nine letters and digits: templates refuse others."""
        if _ID.fullmatch(id_):
            return id_
        return hashlib.sha256(id_.encode(errors="replace")).hexdigest()[:_ID_LENGTH]

    def grammar(
        self, functions: Sequence[Function], literal: Callable[[str], str], parallel: bool
    ) -> str:
        """Return rules for calls."""
        begin = literal(_BEGIN)
        lines = [f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, (name, schema) in enumerate(functions):
            if self._names_first:
                id_ = f"({literal(_CALL_ID)} /[a-zA-Z0-9]{{9}}/)? " if self._has_ids else ""
                head = f"{lark_string(name)} {id_}{literal(_ARGS)}"
                lines.append(f"call_{i}: {head} {lark_json(schema)}")
            else:
                opening = lark_string(f'{{"name": {json.dumps(name)}, "arguments": ')
                lines.append(f'call_{i}: {opening} {lark_json(schema)} "}}"')
        if self._names_first:
            lines.append("behind: call" + (f" ({begin} call)*" if parallel else ""))
        else:
            more = ' (", " call)*' if parallel else ""
            lines.append(f'behind: " "? "[" call{more} "]"')
        lines.append(f"calls: {begin} behind")
        if begin == lark_string(_BEGIN):
            lines += ["free: until_calls behind | rest", f"until_calls[lazy]: TEXT {begin}"]
        else:
            lines.append(f"free: TEXT {begin} behind | rest")
        return "\n".join([*lines, "rest: TEXT"])


class _In(Enum):
    """Where a reader is."""

    START = auto()
    """At the beginning of the text, where a list may stand without the token."""
    TEXT = auto()
    HEAD = auto()
    """Behind the token."""
    OBJECT = auto()
    """In a list."""
    BEHIND = auto()
    """Behind an object of a list."""
    ARGUMENTS = auto()
    BROKEN = auto()


class MistralReader(SteppedReader):
    """See :class:`quire.chat.tool_parsers.interface.ToolReader`.

    Arguments that turn out to be no JSON after they began go on to the next ``[TOOL_CALLS]``, or
    to the end.
    """

    def __init__(self, parallel: bool) -> None:
        super().__init__(_In.START)
        self._parallel = parallel
        self._looks = True
        self._call = CallObject()
        self._scanner = JsonScanner()

    def finish(self) -> list[Event]:
        """Return what was held back."""
        rest, self._rest = self._held + self._rest, ""
        self._held = ""
        if not rest or self._in is _In.BEHIND:
            return []
        return [Arguments(rest) if self._in is _In.BROKEN else Text(rest)]

    # Each step returns whether there may be more to read.

    def _hold(self, count: int) -> None:
        self._held += self._rest[:count]
        self._rest = self._rest[count:]

    def _read_start(self, events: list[Event]) -> bool:
        found = _LIST.match(self._rest)
        if found is not None:
            self._hold(found.end())
            self._begin_object()
        elif _LIST_BEGINNING.fullmatch(self._rest):
            return False
        else:
            self._in = _In.TEXT
        return True

    def _read_text(self, events: list[Event]) -> bool:
        at = self._rest.find(_BEGIN) if self._looks else -1
        found = at >= 0
        if not found:
            at = beginning_of(_BEGIN, self._rest) if self._looks else len(self._rest)
        if at:
            events.append(Text(self._rest[:at]))
        self._rest = self._rest[at:]
        if found:
            self._hold(len(_BEGIN))
            self._in = _In.HEAD
        return found

    def _read_head(self, events: list[Event]) -> bool:
        head = self._rest[:_LONGEST_HEAD]
        if (found := _LIST.match(head)) is not None:
            self._hold(found.end())
            self._begin_object()
        elif (found := _NAMED.match(head)) is not None:
            events.append(CallStart(found[1]))
            self._rest, self._held = self._rest[found.end() :], ""
            self._scanner = JsonScanner()
            self._in = _In.ARGUMENTS
        elif len(self._rest) < _LONGEST_HEAD and (
            _LIST_BEGINNING.fullmatch(head) or _NAMED_BEGINNING.fullmatch(head)
        ):
            return False
        else:
            self._give_up(events)
        return True

    def _give_up(self, events: list[Event]) -> None:
        """Take what was held for text; but a call may begin in it, behind its first character."""
        rest = self._held + self._rest
        events.append(Text(rest[0]))
        self._rest, self._held = rest[1:], ""
        self._in = _In.TEXT

    def _begin_object(self) -> None:
        self._call = CallObject()
        self._in = _In.OBJECT

    def _read_object(self, events: list[Event]) -> bool:
        call = self._call
        self._hold(call.feed(self._rest, events))
        if call.started:
            self._held = ""
        if not call.done and not call.failed:
            return False
        if not call.started:
            self._give_up(events)
        else:
            self._in = _In.BEHIND if call.has_arguments else _In.BROKEN
        return True

    def _read_behind(self, events: list[Event]) -> bool:
        if (found := _LAST.match(self._rest)) is not None:
            self._rest = self._rest[found.end() :]
            self._end_call()
        elif self._parallel and (found := _NEXT.match(self._rest)) is not None:
            self._hold(found.end())
            self._begin_object()
        elif _NEXT_BEGINNING.fullmatch(self._rest):
            return False
        else:
            self._end_call()
        return True

    def _end_call(self) -> None:
        self._in = _In.TEXT
        self._looks = self._parallel

    def _read_arguments(self, events: list[Event]) -> bool:
        at = self._scanner.feed(self._rest)
        if piece := self._scanner.take():
            events.append(Arguments(piece))
        self._rest = self._rest[at:]
        if self._scanner.done:
            self._end_call()
        elif self._scanner.failed:
            self._in = _In.BROKEN
        else:
            return False
        return True

    def _read_broken(self, events: list[Event]) -> bool:
        at = self._rest.find(_BEGIN)
        found = at >= 0
        if not found:
            at = beginning_of(_BEGIN, self._rest)
        kept = self._rest[:at].rstrip()
        if kept:
            events.append(Arguments(kept))
        if found:
            self._rest = self._rest[at:]
            self._end_call()
        else:
            self._rest = self._rest[len(kept) :]
        return found

    steps: ClassVar = {
        _In.START: _read_start,
        _In.TEXT: _read_text,
        _In.HEAD: _read_head,
        _In.OBJECT: _read_object,
        _In.BEHIND: _read_behind,
        _In.ARGUMENTS: _read_arguments,
        _In.BROKEN: _read_broken,
    }
