"""Thoughts between ``<think>`` and ``</think>``, before the answer."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import ClassVar

from quire.chat.held_text import beginning_of
from quire.chat.lark import lark_string
from quire.chat.reasoning_parsers.interface import Split


class ThinkReasoningParser:
    """See :class:`quire.chat.reasoning_parsers.interface.ReasoningParser`.

    A model thinks from its begin tag on, which it writes first or which the prompt ends with.
    """

    name: ClassVar[str] = "think"
    begin: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    always: ClassVar[bool] = False
    """Whether it thinks first without a begin tag, too, unless the prompt has the end tag."""

    def __init__(self, template: str) -> None:
        self.markers: tuple[str, ...] = (self.begin, self.end)

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template is of a model that thinks this way."""
        return cls.end in template and cls.begin in template

    def reader(self, prompt: str) -> ThinkReader:
        """Return a reader of what follows a prompt."""
        return ThinkReader(self.begin, self.end, self._state(prompt))

    def _state(self, prompt: str) -> _In:
        text = prompt.rstrip()
        if text.endswith(self.end):
            return _In.ANSWER
        return _In.UNTAGGED if self.always or text.endswith(self.begin) else _In.START

    def grammar(self, prompt: str, literal: Callable[[str], str]) -> tuple[str, str]:
        """Return how a grammar lets a model think behind a prompt."""
        state = self._state(prompt)
        if state is _In.ANSWER:
            return "", ""
        begin, end = literal(self.begin), literal(self.end)
        # One lexeme where it is text: other lexemes of a grammar may match text that it begins.
        is_text = begin == lark_string(self.begin) and end == lark_string(self.end)
        if state is _In.START and is_text:
            rules = ["thought: thought_end /\\s{0,4}/", f"thought_end[lazy]: {begin} TEXT {end}"]
            return "thought?", "\n".join(rules)
        if end == lark_string(self.end):
            rules = ["thought: thought_end /\\s{0,4}/", f"thought_end[lazy]: TEXT {end}"]
        else:
            rules = [f"thought: TEXT {end} /\\s{{0,4}}/"]
        if state is not _In.START:
            return "thought", "\n".join(rules)
        rules.append(f"tagged_thought: {begin} thought")
        return "tagged_thought?", "\n".join(rules)


class AlwaysThinkReasoningParser(ThinkReasoningParser):
    """For models that think first, whether they or their prompts write the begin tag or not."""

    name: ClassVar[str] = "deepseek_r1"
    always: ClassVar[bool] = True

    @classmethod
    def suits(cls, template: str) -> bool:
        """Return whether a chat template is of a model that thinks this way."""
        return cls.end in template and cls.begin not in template


class BracketThinkReasoningParser(ThinkReasoningParser):
    """For models of Mistral AI, whose tags are tokens in brackets."""

    name: ClassVar[str] = "mistral"
    begin: ClassVar[str] = "[THINK]"
    end: ClassVar[str] = "[/THINK]"


class _In(Enum):
    """Where a reader is."""

    START = auto()
    """Before anything but whitespace; a begin tag may come."""
    UNTAGGED = auto()
    """The same, but thoughts come also without a begin tag, or behind a second one."""
    THOUGHT = auto()
    ANSWER = auto()


class ThinkReader:
    """See :class:`quire.chat.reasoning_parsers.interface.ReasoningReader`.

    Whitespace beside the tags belongs to neither side. Thoughts that do not end are thoughts to
    the end of the text. Behind the answer's first character, tags are text.
    """

    def __init__(self, begin: str, end: str, state: _In) -> None:
        self._begin = begin
        self._end = end
        self._in = state
        self._rest = ""
        self._is_first = True  # whether only whitespace has come since the last tag

    def feed(self, text: str) -> Split:
        """Read more text; return what is sure."""
        if self._in is _In.ANSWER and not self._is_first:
            return Split(answer=text)
        self._rest += text
        if self._in in (_In.START, _In.UNTAGGED) and not self._read_start():
            return Split()
        reasoning = self._read_thought() if self._in is _In.THOUGHT else ""
        return Split(reasoning, self._read_answer() if self._in is _In.ANSWER else "")

    def finish(self) -> Split:
        """Return what was held back."""
        rest, self._rest = self._rest, ""
        if self._in in (_In.THOUGHT, _In.UNTAGGED):
            return Split(reasoning=rest)
        return Split(answer=rest)

    def _read_start(self) -> bool:
        """Look for a begin tag; return whether it is known if there is one."""
        text = self._rest.lstrip()
        if text.startswith(self._begin):
            self._rest = text[len(self._begin) :]
            self._in = _In.THOUGHT
        elif self._begin.startswith(text):
            return False
        elif self._in is _In.UNTAGGED:
            self._in = _In.THOUGHT
        else:
            self._in, self._is_first = _In.ANSWER, False
        return True

    def _read_thought(self) -> str:
        if self._is_first:
            self._rest = self._rest.lstrip()
        at = self._rest.find(self._end)
        found = at >= 0
        if not found:
            at = beginning_of(self._end, self._rest)
        thought = self._rest[:at].rstrip()
        if found:
            self._rest = self._rest[at + len(self._end) :]
            self._in, self._is_first = _In.ANSWER, True
        elif thought:
            self._rest = self._rest[len(thought) :]
            self._is_first = False
        return thought

    def _read_answer(self) -> str:
        if self._is_first:
            self._rest = self._rest.lstrip()
        answer, self._rest = self._rest, ""
        self._is_first = self._is_first and not answer
        return answer
