"""Load: many streamed completions over HTTP, by a client that takes as little time as it can.

The client shares the machine with the server. While it measures it does nothing but note when
bytes arrive; what they say is read afterwards.
"""

from __future__ import annotations

import gc
import json
import random
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from urllib.parse import urlsplit

from quire.bench.contest import BenchError
from quire.bench.sse import Response, parse_response
from quire.bench.workload import Workload

_NO_ANSWER = 600.0  # seconds without a byte, after which a server is given up
_PACKET = 2**16  # most bytes that are read at once


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and the model to ask for there.

    Attributes
    ----------
    url : str
        Such as ``http://localhost:8000/v1``.
    model : str
    api_key : str or None
    """

    url: str
    model: str
    api_key: str | None = None

    def request(self, prompt: list[int], num_tokens: int) -> bytes:
        """Return a request for exactly so many tokens, streamed."""
        parts = urlsplit(self.url)
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode("ascii")
        lines = [
            f"POST {parts.path.rstrip('/')}/completions HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True, slots=True)
class Timing:
    """When what happened to one request.

    Attributes
    ----------
    sent : float
    arrivals : list of float
        Of each piece of text.
    ended : float
    num_tokens : int
        As the server counts them.
    """

    sent: float
    arrivals: list[float]
    ended: float
    num_tokens: int

    @property
    def first_token(self) -> float:
        """Seconds to the first piece."""
        return self.arrivals[0] - self.sent

    @property
    def whole(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between a piece and the next."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def per_token(self) -> float:
        """Mean seconds of a token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.num_tokens - 1, 1)


def draw_starts(count: int, rate: float | None, seed: int) -> list[float]:
    """Return when requests begin, in seconds: at once, or as a Poisson process of that rate."""
    if rate is None:
        return [0.0] * count
    rng = random.Random(seed)
    now, starts = 0.0, []
    for _ in range(count):
        starts.append(now)
        now += rng.expovariate(rate)
    return starts


def run_load(
    target: Target, workload: Workload, starts: Sequence[float], concurrency: int | None
) -> list[Timing]:
    """Ask for all completions of a workload, and return when they came.

    Parameters
    ----------
    target : Target
    workload : Workload
    starts : sequence of float
        When each request may begin, in seconds.
    concurrency : int or None
        Most requests at once.

    Raises
    ------
    BenchError
        The server is not there, refuses a request, or gives another number of tokens.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be taken for a pause of the server
    try:
        asked = _run(target, workload, starts, concurrency)
    finally:
        if was_enabled:
            gc.enable()
    return [
        _timing(each.sent, each.packets, expected)
        for each, expected in zip(asked, workload.output_lens, strict=True)
    ]


def _run(
    target: Target, workload: Workload, starts: Sequence[float], concurrency: int | None
) -> list[_Asked]:
    """Ask, and note what comes; an event loop would take several times as long for it."""
    asked = [
        _Asked(target.request(prompt, count))
        for prompt, count in zip(workload.prompts, workload.output_lens, strict=True)
    ]
    waiting = deque(sorted(zip(starts, asked, strict=True), key=lambda pair: pair[0]))
    most = concurrency or len(asked)
    running = 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        begun = time.perf_counter()
        while waiting or running:
            timeout = _NO_ANSWER
            while waiting and running < most:
                timeout = begun + waiting[0][0] - time.perf_counter()
                if timeout > 0:
                    break
                each = waiting.popleft()[1]
                connection = stack.enter_context(each.send(target))
                selector.register(connection, selectors.EVENT_READ, each)
                running += 1
                timeout = 0
            ready = selector.select(min(timeout, _NO_ANSWER))
            now = time.perf_counter()
            if not ready and running and timeout >= _NO_ANSWER:
                raise BenchError(f"the server said nothing for {_NO_ANSWER:.0f} s")
            for key, _ in ready:
                connection = cast(socket.socket, key.fileobj)
                if not key.data.receive(connection, now):
                    selector.unregister(connection)
                    connection.close()
                    running -= 1
    return asked


class _Asked:
    """A request on its way, and what came of it."""

    __slots__ = ("packets", "request", "sent")

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.sent = 0.0
        self.packets: list[tuple[float, bytes]] = []

    def send(self, target: Target) -> socket.socket:
        """Connect, and send all of it."""
        self.sent = time.perf_counter()
        parts = urlsplit(target.url)
        host, is_secure = parts.hostname or "", parts.scheme == "https"
        try:
            connection = socket.create_connection(
                (host, parts.port or (443 if is_secure else 80)), timeout=_NO_ANSWER
            )
            try:
                if is_secure:
                    context = ssl.create_default_context()
                    connection = context.wrap_socket(connection, server_hostname=host)
                connection.sendall(self.request)
                connection.setblocking(False)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise BenchError(f"no server answers at {target.url}: {error}") from error
        return connection

    def receive(self, connection: socket.socket, now: float) -> bool:
        """Take what is there; return whether more may come."""
        try:
            while data := connection.recv(_PACKET):
                self.packets.append((now, data))
                if len(data) < _PACKET and not isinstance(connection, ssl.SSLSocket):
                    return True
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass  # broken off, which the answer shows
        return False


def _timing(sent: float, packets: list[tuple[float, bytes]], expected: int) -> Timing:
    try:
        response = parse_response(packets)
    except (ValueError, LookupError) as error:
        raise BenchError(f"the server answers with what is no completion: {error}") from error
    if response.status != 200 or not response.is_complete:
        raise BenchError(f"the server answers {response.status}: {_reason(response)}")
    pieces = [event.seconds for event in response.events if event.data.get("choices")]
    usages: list[Any] = [event.data["usage"] for event in response.events if _usage(event.data)]
    count = usages[-1]["completion_tokens"] if usages else len(pieces)
    if count != expected or not pieces:
        raise BenchError(f"the server generated {count} tokens, not {expected}")
    return Timing(sent, pieces, packets[-1][0], count)


def _usage(data: dict[str, Any]) -> bool:
    return isinstance(data.get("usage"), dict)


def _reason(response: Response) -> str:
    for event in response.events:
        if "error" in event.data:
            return str(event.data["error"])
    return response.body[-1000:].decode("utf-8", "replace") or "nothing"
