"""ResponseBuilder: an answer as it comes, in items and events of the Responses API."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from quire.chat import ChatDelta, ToolCallDelta

Event = dict[str, Any]


class ResponseBuilder:
    """Makes a response's items, and tells of each change by an event.

    An answer is a row of items, one open at a time: reasoning, a message, calls of functions.

    Parameters
    ----------
    head : dict
        The fields of the response that are known from the beginning.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self._items: list[dict[str, Any]] = []
        self._is_open = False
        self._call = -1
        self._status = "in_progress"
        self._rest: dict[str, Any] = {"usage": None, "error": None, "incomplete_details": None}
        self._num_events = 0

    def response(self) -> dict[str, Any]:
        """Return the response as far as it is known."""
        return {**self._head, "status": self._status, "output": list(self._items), **self._rest}

    def start(self) -> list[Event]:
        """Return the events before the first token."""
        return [
            self._event("response.created", response=self.response()),
            self._event("response.in_progress", response=self.response()),
        ]

    def feed(self, delta: ChatDelta, logprobs: list[dict[str, Any]] | None = None) -> list[Event]:
        """Take what is new; return the events that tell of it.

        Parameters
        ----------
        delta : ChatDelta
        logprobs : list of dict, optional
            Of the tokens of its content.
        """
        events: list[Event] = []
        if delta.reasoning:
            events += self._add_text("reasoning", delta.reasoning, None)
        if delta.content:
            events += self._add_text("message", delta.content, logprobs)
        for call in delta.tool_calls:
            events += self._add_call(call)
        return events

    def finish(self, finish_reason: str | None, usage: dict[str, Any]) -> list[Event]:
        """End the response; return the last events."""
        cut = finish_reason in ("length", "abort")
        events = self._close("incomplete" if cut else "completed")
        self._rest["usage"] = usage
        self._status = "incomplete" if cut else "completed"
        if cut:
            reason = "max_output_tokens" if finish_reason == "length" else "aborted"
            self._rest["incomplete_details"] = {"reason": reason}
        return [*events, self._event(f"response.{self._status}", response=self.response())]

    def fail(self, message: str) -> list[Event]:
        """End the response with an error; return the last events."""
        self._status = "failed"
        self._rest["error"] = {"code": "server_error", "message": message}
        return [self._event("response.failed", response=self.response())]

    # -- items -----------------------------------------------------------------------------------

    def _add_text(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self._items[-1]["type"] != kind:
            events += self._close("completed")
            events += self._open(_EMPTY[kind]())
            events.append(self._part_event("response.content_part.added"))
        part = self._items[-1]["content"][0]
        part["text"] += text
        if kind == "reasoning":
            return [*events, self._part("response.reasoning_text.delta", delta=text)]
        if logprobs:
            part["logprobs"] += logprobs
        event = self._part("response.output_text.delta", delta=text, logprobs=logprobs or [])
        return [*events, event]

    def _add_call(self, call: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        is_open = self._is_open and self._items[-1]["type"] == "function_call"
        if not is_open or call.index != self._call:
            events += self._close("completed")
            self._call = call.index
            item = {
                "id": _new_id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
            }
            events += self._open(item)
        if call.arguments:
            self._items[-1]["arguments"] += call.arguments
            kind = "response.function_call_arguments.delta"
            events.append(self._of_item(kind, delta=call.arguments))
        return events

    def _open(self, item: dict[str, Any]) -> list[Event]:
        bare = {**item, "content": []} if "content" in item else dict(item)
        self._items.append(item)
        self._is_open = True
        place = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=place, item=bare)]

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = status
        events: list[Event] = []
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            done = self._of_item(kind, arguments=item["arguments"], name=item["name"])
            events.append(done)
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                events.append(self._part("response.reasoning_text.done", text=part["text"]))
            else:
                kind = "response.output_text.done"
                done = self._part(kind, text=part["text"], logprobs=part["logprobs"])
                events.append(done)
            events.append(self._part_event("response.content_part.done"))
        place = len(self._items) - 1
        return [*events, self._event("response.output_item.done", output_index=place, item=item)]

    # -- events ----------------------------------------------------------------------------------

    def _part_event(self, kind: str) -> Event:
        # A copy: events are written when all of a step's are there.
        return self._part(kind, part=deepcopy(self._items[-1]["content"][0]))

    def _part(self, kind: str, **values: Any) -> Event:
        return self._of_item(kind, content_index=0, **values)

    def _of_item(self, kind: str, **values: Any) -> Event:
        place = len(self._items) - 1
        return self._event(kind, item_id=self._items[-1]["id"], output_index=place, **values)

    def _event(self, kind: str, **values: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number, **values}


def _new_message() -> dict[str, Any]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "id": _new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [part],
    }


def _new_reasoning() -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": ""}
    return {
        "id": _new_id("rs"),
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [part],
    }


_EMPTY = {"message": _new_message, "reasoning": _new_reasoning}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
