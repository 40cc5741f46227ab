"""An answer as it came from a socket: which events arrived when."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event.

    Attributes
    ----------
    seconds : float
        When its last byte was there.
    data : dict
    """

    seconds: float
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer.

    Attributes
    ----------
    status : int
    body : bytes
        Without the marks of its transfer.
    events : list of Arrival
        Empty where it is none of server-sent events.
    is_complete : bool
        Whether the end came that was announced.
    """

    status: int
    body: bytes
    events: list[Arrival]
    is_complete: bool


def parse_response(packets: list[tuple[float, bytes]]) -> Response:
    """Take an answer apart, after the fact: reading takes time that would be measured.

    Parameters
    ----------
    packets : list of (float, bytes)
        When bytes came, and which.
    """
    raw = b"".join(data for _, data in packets)
    ends = list(accumulate(len(data) for _, data in packets))
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        return Response(0, raw, [], is_complete=False)
    status = int(head.split(b" ", 2)[1])
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    start = len(head) + 4
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        pieces, is_complete = _chunks(raw, start)
    else:
        pieces = [(start, len(raw))]
        length = headers.get(b"content-length")
        is_complete = length is None or int(length) == len(raw) - start
    body = b"".join(raw[low:high] for low, high in pieces)
    events = []
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        for end, data in _events(body):
            if data == b"[DONE]":
                break
            packet = bisect_left(ends, _place(pieces, end))
            events.append(Arrival(packets[packet][0], json.loads(data)))
        else:
            is_complete = False
    return Response(status, body, events, is_complete)


def _chunks(raw: bytes, at: int) -> tuple[list[tuple[int, int]], bool]:
    """Return where the chunks' contents lie, and whether the last one is there."""
    pieces: list[tuple[int, int]] = []
    while (line := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line].split(b";")[0], 16)
        if size == 0:
            return pieces, True
        low = line + 2
        if low + size > len(raw):
            break
        pieces.append((low, low + size))
        at = low + size + 2
    return pieces, False


def _events(body: bytes) -> list[tuple[int, bytes]]:
    """Return the data of each event, with where in the body it ends."""
    found, at = [], 0
    for line in body.splitlines(keepends=True):
        at += len(line)
        if line.startswith(b"data:") and line.endswith(b"\n"):
            found.append((at, line[5:].strip()))
    return found


def _place(pieces: list[tuple[int, int]], end: int) -> int:
    """Return where in all bytes the first ``end`` bytes of the body end."""
    for low, high in pieces:
        if end <= high - low:
            return low + end
        end -= high - low
    raise ValueError("the body is shorter")
