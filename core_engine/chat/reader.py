"""ChatReader: the text of a completion to the message that it is, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quire.chat.message import ChatDelta, ChatMessage, ToolCall, ToolCallDelta
from quire.chat.reasoning_parsers.interface import ReasoningReader, Split
from quire.chat.tool_parsers.interface import CallStart, Event, Text, ToolReader


class ChatReader:
    """Read one completion.

    What the deltas say, put together, is :attr:`message`, and that does not depend on how the
    text was cut into pieces. What is no call is content: no text is lost but the tags, and the
    whitespace beside them. Made by :meth:`quire.chat.ChatFormat.reader`.

    Parameters
    ----------
    tool_reader : ToolReader or None
        None where there is nothing to call.
    reasoning_reader : ReasoningReader or None
    new_id : callable
        Returns an id for a call.
    """

    def __init__(
        self,
        tool_reader: ToolReader | None,
        reasoning_reader: ReasoningReader | None,
        new_id: Callable[[], str],
    ) -> None:
        self._tool_reader = tool_reader
        self._reasoning_reader = reasoning_reader
        self._new_id = new_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []
        self._blank: list[str] = []  # whitespace that belongs to the content if more of it comes
        self._finished = False

    def feed(self, text: str) -> ChatDelta:
        """Read more text.

        Parameters
        ----------
        text : str
            What is new of the completion.

        Returns
        -------
        ChatDelta
            What that makes sure of the message; it may be empty, and may be of earlier text.
        """
        delta = ChatDelta()
        if not text or self._finished:
            return delta
        if self._reasoning_reader is None:
            self._read_answer(text, delta)
        else:
            self._read_split(self._reasoning_reader.feed(text), delta)
        return delta

    def finish(self) -> ChatDelta:
        """Return what was held back: nothing follows any more."""
        delta = ChatDelta()
        if self._finished:
            return delta
        self._finished = True
        if self._reasoning_reader is not None:
            self._read_split(self._reasoning_reader.finish(), delta)
        if self._tool_reader is not None:
            self._take(self._tool_reader.finish(), delta)
        if self._blank and not self._calls:
            self._add_content("".join(self._blank), delta)
            self._blank = []
        return delta

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has been told."""
        return bool(self._calls)

    @property
    def message(self) -> ChatMessage:
        """All that has been told so far."""
        content = "".join(self._content)
        calls = [ToolCall(id_, name, "".join(parts)) for id_, name, parts in self._calls]
        return ChatMessage(
            content=content if content or not calls else None,
            reasoning="".join(self._reasoning) or None,
            tool_calls=calls,
        )

    def _read_split(self, split: Split, delta: ChatDelta) -> None:
        if split.reasoning:
            self._reasoning.append(split.reasoning)
            delta.reasoning += split.reasoning
        if split.answer:
            self._read_answer(split.answer, delta)

    def _read_answer(self, text: str, delta: ChatDelta) -> None:
        if self._tool_reader is None:
            self._add_content(text, delta)
        else:
            self._take(self._tool_reader.feed(text), delta)

    def _take(self, events: Iterable[Event], delta: ChatDelta) -> None:
        for event in events:
            if isinstance(event, Text):
                self._take_text(event.text, delta)
            elif isinstance(event, CallStart):
                if not self._content:
                    self._blank = []
                self._calls.append((self._new_id(), event.name, []))
                id_, name, _ = self._calls[-1]
                delta.tool_calls.append(ToolCallDelta(len(self._calls) - 1, id_, name))
            else:
                self._take_arguments(event.text, delta)

    def _take_text(self, text: str, delta: ChatDelta) -> None:
        """Take in content, but for whitespace at its end, which a call may follow."""
        kept = text.rstrip()
        if kept:
            text = "".join([*self._blank, text])
            kept = text.rstrip()
            self._blank = []
            self._add_content(kept.lstrip() if self._calls and not self._content else kept, delta)
        if len(kept) < len(text):
            self._blank.append(text[len(kept) :])

    def _add_content(self, text: str, delta: ChatDelta) -> None:
        self._content.append(text)
        delta.content += text

    def _take_arguments(self, text: str, delta: ChatDelta) -> None:
        index = len(self._calls) - 1
        self._calls[index][2].append(text)
        last = delta.tool_calls[-1] if delta.tool_calls else None
        if last is None or last.index != index:
            delta.tool_calls.append(ToolCallDelta(index, arguments=text))
        else:
            delta.tool_calls[-1] = ToolCallDelta(index, last.id, last.name, last.arguments + text)
