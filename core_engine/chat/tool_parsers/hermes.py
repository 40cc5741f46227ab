"""Calls as Hermes and Qwen models write them: JSON between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import ClassVar, Final

from quire.chat.call_object import CallObject
from quire.chat.held_text import beginning_of
from quire.chat.lark import lark_json, lark_string
from quire.chat.tool_parsers.interface import Arguments, Event, Function, Text
from quire.chat.tool_parsers.stepped_reader import SteppedReader

_BEGIN: Final = "<tool_call>"
_END: Final = "</tool_call>"
_TAG: Final = re.compile(r"</?tool_call>")
_LOOSE: Final = re.compile(r"[\s}]*")
_OTHER_DIALECTS: Final = ("<function=", "<arg_key>")
"""What stands in the templates of models that write something else between the same tags."""


class HermesToolParser:
    """See :class:`quire.chat.tool_parsers.interface.ToolParser`."""

    name: ClassVar[str] = "hermes"
    is_json: ClassVar[bool] = False
    markers: tuple[str, ...] = (_BEGIN, _END)

    def __init__(self, template: str) -> None:
        pass

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template writes calls this way."""
        return _BEGIN in template and not any(mark in template for mark in _OTHER_DIALECTS)

    def reader(self, parallel: bool) -> HermesReader:
        """Return a reader."""
        return HermesReader(parallel)

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
        begin, end = literal(_BEGIN), literal(_END)
        lines = [
            f"calls: {begin} call" + (rf' ("\n" {begin} call)*' if parallel else ""),
            rf'call: "\n" ({" | ".join(f"call_{i}" for i in range(len(functions)))}) "\n" {end}',
        ]
        for i, (name, schema) in enumerate(functions):
            opening = lark_string(f'{{"name": {json.dumps(name)}, "arguments": ')
            lines.append(f'call_{i}: {opening} {lark_json(schema)} "}}"')
        if begin == lark_string(_BEGIN):
            lines += ["free_call: until_call call", f"until_call[lazy]: TEXT {begin}"]
        else:
            lines.append(f"free_call: TEXT {begin} call")
        lines.append("free: free_call* rest" if parallel else "free: free_call | rest")
        return "\n".join([*lines, "rest: TEXT"])


class _In(Enum):
    """Where a reader is."""

    TEXT = auto()
    CALL = auto()
    BEHIND = auto()
    """Behind a call, before its end tag."""
    BROKEN = auto()
    """In arguments that are no JSON."""


class HermesReader(SteppedReader):
    """See :class:`quire.chat.tool_parsers.interface.ToolReader`.

    A call that is told stays one. When its arguments turn out to be no JSON after they began,
    what stands up to the end tag is appended to them as it is. A missing end tag, or a missing
    or a surplus brace behind the arguments, is forgiven.
    """

    def __init__(self, parallel: bool) -> None:
        super().__init__(_In.TEXT)
        self._parallel = parallel
        self._looks = True
        self._call = CallObject()

    def finish(self) -> list[Event]:
        """Return what was held back."""
        rest, self._rest = self._held + self._rest, ""
        self._held = ""
        if not rest or self._in is _In.BEHIND:
            return []  # behind a call, it is the beginning of an end tag
        return [Arguments(rest) if self._in is _In.BROKEN else Text(rest)]

    # Each step returns whether there may be more to read.

    def _read_text(self, events: list[Event]) -> bool:
        at = self._rest.find(_BEGIN) if self._looks else -1
        found = at >= 0
        if not found:
            at = beginning_of(_BEGIN, self._rest) if self._looks else len(self._rest)
        if at:
            events.append(Text(self._rest[:at]))
        self._rest = self._rest[at:]
        if found:
            self._begin_call()
        return found

    def _begin_call(self) -> None:
        self._rest = self._rest[len(_BEGIN) :]
        self._held = _BEGIN
        self._call = CallObject()
        self._in = _In.CALL

    def _end_call(self) -> None:
        self._in = _In.TEXT
        self._looks = self._parallel

    def _read_call(self, events: list[Event]) -> bool:
        call = self._call
        at = call.feed(self._rest, events)
        if call.started:
            self._held = ""
        else:
            self._held += self._rest[:at]
        self._rest = self._rest[at:]
        if not call.done and not call.failed:
            return False
        if call.started:
            self._in = _In.BEHIND if call.has_arguments else _In.BROKEN
            return True
        # The tag was text. What follows it is read anew: a call may begin there.
        events.append(Text(_BEGIN))
        self._rest = self._held[len(_BEGIN) :] + self._rest
        self._held = ""
        self._in = _In.TEXT
        return True

    def _read_behind(self, events: list[Event]) -> bool:
        at = _LOOSE.match(self._rest).end()  # type: ignore[union-attr]
        if self._rest.startswith(_END, at):
            self._rest = self._rest[at + len(_END) :]
        elif _END.startswith(self._rest[at:]):
            return False
        self._end_call()
        return True

    def _read_broken(self, events: list[Event]) -> bool:
        found = _TAG.search(self._rest)
        if found is None:
            at = min(beginning_of(_BEGIN, self._rest), beginning_of(_END, self._rest))
        else:
            at = found.start()
        kept = self._rest[:at].rstrip()
        if kept:
            events.append(Arguments(kept))
        if found is None:
            self._rest = self._rest[len(kept) :]
            return False
        is_end = found[0] == _END
        self._rest = self._rest[found.end() if is_end else at :]
        self._end_call()
        return True

    steps: ClassVar = {
        _In.TEXT: _read_text,
        _In.CALL: _read_call,
        _In.BEHIND: _read_behind,
        _In.BROKEN: _read_broken,
    }
