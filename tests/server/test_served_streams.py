"""Streams: what readers do to them, and what becomes of requests that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from sse import events_of

from quire import LLM
from quire.errors import EngineBusyError, EngineClosedError, RequestFailedError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.disconnect import until_disconnect
from quire.server.errors import ApiError
from quire.server.service import Service
from quire.server.sse import DONE, EventStream, event

ENDLESS = {"max_tokens": 2000, "ignore_eos": True, "logit_bias": {"100": 100.0}}
PATHS = {
    "/v1/completions": {"prompt": ["One", "Two", "Three"], "n": 2, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "n": 3},
}


class Exchange:
    """A request to an ASGI application, and the client that can go away at any time."""

    def __init__(self, app: Any, path: str, body: dict) -> None:
        self.messages: list[dict] = []
        self.arrived = asyncio.Condition()
        self.gone = asyncio.Event()
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._body = json.dumps(body).encode()
        self._sent = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"server")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        await self.may_write.wait()
        async with self.arrived:
            self.messages.append(message)
            self.arrived.notify_all()

    async def wait_for(self, count: int) -> None:
        """Wait for that many messages of the server."""
        async with self.arrived:
            await asyncio.wait_for(
                self.arrived.wait_for(lambda: len(self.messages) >= count or self.task.done()), 30
            )

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.messages if m["type"] == "http.response.body")


async def running(llm: LLM) -> float:
    return (await asyncio.to_thread(llm.get_metrics))["num_unfinished_requests"]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_goes_away_ends_its_requests(
    demo_app: Any, demo_llm: LLM, path: str, stream: bool
) -> None:
    """All prompts and samples are aborted within a step or two, and their blocks are free."""
    before = await asyncio.to_thread(demo_llm.get_metrics)
    exchange = Exchange(demo_app, path, {**PATHS[path], **ENDLESS, "stream": stream})
    if stream:
        await exchange.wait_for(5)
    else:
        while await running(demo_llm) < len(PATHS[path].get("prompt", "x")):
            await asyncio.sleep(0.01)
    exchange.gone.set()
    await asyncio.wait_for(exchange.task, 10)
    steps = (await asyncio.to_thread(demo_llm.get_metrics))["num_steps"]
    while await running(demo_llm):
        await asyncio.sleep(0.001)
    after = await asyncio.to_thread(demo_llm.get_metrics)
    assert after["num_steps"] - steps <= 2
    assert after["kv_cache_usage"] == 0
    generated = after["num_generation_tokens"] - before["num_generation_tokens"]
    assert generated < 6 * 1900, "it went on to the end"


async def test_a_client_that_goes_away_while_it_waits_ends_its_request(
    demo_app: Any, demo_llm: LLM
) -> None:
    """Also before there is a first token to send."""
    exchange = Exchange(
        demo_app, "/v1/completions", {"prompt": "red " * 1500, **ENDLESS, "stream": True}
    )
    exchange.gone.set()
    await asyncio.wait_for(exchange.task, 20)
    while await running(demo_llm):
        await asyncio.sleep(0.01)
    assert DONE not in exchange.body


async def test_a_slow_reader_gets_all_of_it(demo_app: Any) -> None:
    """A stream waits for its reader, and is what a quick reader gets."""
    body = {"prompt": "One two", "max_tokens": 40, "temperature": 0, "stream": True}
    quick = Exchange(demo_app, "/v1/completions", body)
    await quick.task
    slow = Exchange(demo_app, "/v1/completions", body)
    await slow.wait_for(2)
    slow.may_write.clear()
    count = len(slow.messages)
    await asyncio.sleep(0.3)
    assert len(slow.messages) <= count + 1, "events are sent though nobody reads"
    slow.may_write.set()
    await slow.task

    def text(exchange: Exchange) -> str:
        return "".join(e["choices"][0]["text"] for e in events_of(exchange.body.decode()))

    assert text(slow) == text(quick)


async def test_the_headers_of_a_stream(http: httpx.AsyncClient) -> None:
    """Proxies are told not to keep events back, and clients what they get."""
    answer = await http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True}
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.fixture
def failing(demo_service: Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the engine say some words and then fail in a given way."""

    def make(words: int, error: Exception) -> None:
        async def generate(*_: Any, **__: Any) -> AsyncIterator[RequestOutput]:
            for _ in range(words):
                yield RequestOutput("r", "p", [1], outputs=[CompletionOutput(0, "word", [5])])
            raise error

        monkeypatch.setattr(demo_service, "generate", generate)

    return make


FAILURES = [
    (RequestFailedError("r", "a step failed"), 500, None),
    (EngineBusyError("too many wait", 2.0), 503, "overloaded"),
    (EngineClosedError("closed"), 503, "engine_closed"),
]


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=["failed", "busy", "closed"])
@pytest.mark.parametrize("path", PATHS)
async def test_an_error_before_the_first_word_has_a_status(
    http: httpx.AsyncClient, failing: Any, path: str, error: Exception, status: int, code: str
) -> None:
    """A stream that never began is no 200."""
    failing(0, error)
    answer = await http.post(path, json={**PATHS[path], "n": 1, "stream": True})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    if status == 503 and code == "overloaded":
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_in_mid_stream_is_an_event_that_ends_it(
    http: httpx.AsyncClient, failing: Any, path: str
) -> None:
    """What came before it was sent; there is no ``[DONE]`` that would say all is well."""
    failing(3, RequestFailedError("r", "a step failed"))
    answer = await http.post(path, json={**PATHS[path], "n": 1, "stream": True})
    assert answer.status_code == 200
    *chunks, last, end = answer.text.split("\n\n")
    assert end == ""
    assert len(chunks) >= 3
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in answer.text


async def test_openais_client_raises_the_error_of_a_stream(
    client: openai.AsyncOpenAI, failing: Any
) -> None:
    """The official client does not take it for an end."""
    failing(2, RequestFailedError("r", "a step failed"))
    stream = await client.completions.create(model="demo", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="a step failed"):
        async for _ in stream:
            pass


async def test_a_request_that_the_engine_aborts_is_an_error(
    http: httpx.AsyncClient, demo_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an answer is not passed off as an answer."""

    async def generate(*_: Any, **__: Any) -> AsyncIterator[RequestOutput]:
        output = CompletionOutput(0, "half", [5], finish_reason="abort")
        yield RequestOutput("r", "p", [1], outputs=[output], finished=True)

    monkeypatch.setattr(demo_service, "generate", generate)
    answer = await http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "aborted"


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    """until_disconnect returns only when the work has ended, and has cleaned up."""
    cleaned = asyncio.Event()

    async def receive() -> dict:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with pytest.raises(ApiError) as caught:
        await until_disconnect(receive, work())
    assert caught.value.status == 499
    assert cleaned.is_set()


async def test_nothing_is_left_of_work_that_is_cancelled() -> None:
    """Neither the work nor the watcher outlives a request that its server gives up."""

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def work() -> None:
        await asyncio.sleep(60)

    before = asyncio.all_tasks()
    task = asyncio.ensure_future(until_disconnect(receive, work()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before


async def test_a_stream_is_closed_when_sending_fails() -> None:
    """A connection that breaks ends the events behind it."""
    closed = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield event({"a": 1})
        finally:
            closed.set()

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    source = events()
    async with aclosing(source):
        await EventStream(await anext(source), source)({}, receive, send)
        assert closed.is_set()


def test_events_are_one_line_whatever_is_in_them() -> None:
    """Line ends within a text do not end an event."""
    data = {"text": "a\n\nb\r\u2028c"}
    [line, *rest] = event(data).decode().split("\n")
    assert rest == ["", ""]
    assert json.loads(line.removeprefix("data: ")) == data
    assert event({}, "done").decode() == "event: done\ndata: {}\n\n"


def test_a_connection_that_is_cut_frees_the_server(served) -> None:
    """Against the real process: the answer to the next request does not wait for the old ones."""
    parts = urlsplit(served.url)
    body = json.dumps({"prompt": ["One", "Two"], "n": 4, "stream": True, **ENDLESS}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(3):
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            connection.sendall(head.encode() + body)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    with openai.OpenAI(api_key="EMPTY", base_url=f"{served.url}/v1") as client:
        started = time.monotonic()
        client.completions.create(model="quire/demo", prompt="a", max_tokens=2)
        assert time.monotonic() - started < 20
