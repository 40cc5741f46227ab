"""`quire chat --url` and `quire complete --url`: a server is asked, and what it says is shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("openai", reason="openai is in the extras 'openai' and 'dev'")

from quire.cli.app import app
from quire.cli.remote import RemoteError
from quire.errors import InvalidRequestError, QuireError


class Stub:
    """A server that answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.status = 200
        self.body: dict[str, Any] = {}
        self.events: list[Any] = []
        self.ends: list[Any] = [
            {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "stop"}]}
        ]
        self.breaks_off = False
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def answer(self, body: Any) -> None:
                stub.asked.append((self.path, self.headers["authorization"], body))
                streamed = body is not None and body.get("stream") and stub.status == 200
                self.send_response(stub.status)
                if streamed:
                    events = b"".join(
                        b"data: " + json.dumps(each).encode() + b"\n\n"
                        for each in [*stub.events, *stub.ends]
                    )
                    data, kind = events + b"data: [DONE]\n\n", "text/event-stream"
                elif body is None:
                    data, kind = b'{"object":"list","data":[{"id":"first"}]}', "application/json"
                else:
                    data, kind = json.dumps(stub.body).encode(), "application/json"
                self.send_header("content-type", kind)
                length = len(data) + (100 if streamed and stub.breaks_off else 0)
                self.send_header("content-length", str(length))
                self.end_headers()
                if stub.breaks_off:
                    data = data.removesuffix(b"data: [DONE]\n\n")
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def test_a_chat_sends_what_was_said_and_leaves_reasoning_out(stub: Stub) -> None:
    """Reasoning is shown, and no part of the history; the first model of the server is asked."""
    stub.events = [
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(content="An"),
        delta(content="swer"),
        {"choices": [], "usage": {}},
    ]
    result = invoke(
        "chat", "--url", stub.url, "--system", "Be kind.", "--top-k", "5", stdin="hi\nagain\n"
    )
    assert result.exit_code == 0, result.output
    assert "hm\n\nAnswer\n" in result.stdout
    assert [path for path, _, _ in stub.asked] == ["/v1/models", *["/v1/chat/completions"] * 2]
    body = stub.asked[-1][2]
    assert (body["model"], body["stream"], body["top_k"]) == ("first", True, 5)
    assert "max_tokens" not in body
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Answer"},
        {"role": "user", "content": "again"},
    ]


def test_completions_are_shown_as_those_of_an_engine_here(stub: Stub) -> None:
    """In the prompts' order, each with its own, whatever order the server has."""
    stub.body = {
        "choices": [{"index": i, "text": f"t{i}", "finish_reason": "stop"} for i in (3, 0, 2, 1)]
    }
    arguments = ("complete", "a", "b", "--url", f"{stub.url}/v1", "--model", "m", "--n", "2")
    records = [json.loads(line) for line in invoke(*arguments, "--json").stdout.splitlines()]
    shown = [(r["prompt"], r["index"], r["text"]) for r in records]
    assert shown == [("a", 0, "t0"), ("a", 1, "t1"), ("b", 0, "t2"), ("b", 1, "t3")]
    [(path, key, body)] = stub.asked
    assert (path, key) == ("/v1/completions", "Bearer EMPTY")
    assert (body["prompt"], body["n"], body["max_tokens"]) == (["a", "b"], 2, 128)
    assert invoke(*arguments).stdout == "== a\n-- 0\nt0\n-- 1\nt1\n== b\n-- 0\nt2\n-- 1\nt3\n"


def test_one_completion_is_streamed(stub: Stub) -> None:
    stub.events = [{"choices": [{"index": 0, "text": text}]} for text in ("a", "", "b")]
    result = invoke("complete", "x", "--url", stub.url, "--model", "m", "--api-key", "secret")
    assert result.stdout == "ab\n"
    assert stub.asked[0][1] == "Bearer secret"


def test_the_key_is_that_of_the_servers_variable(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several the first; without one, what servers without keys are sent."""
    stub.body = {"choices": []}
    for told, key in (("first, second", "first"), ("", "EMPTY")):
        monkeypatch.setenv("QUIRE_API_KEY", told)
        invoke("complete", "x", "--url", stub.url, "--model", "m", "--json")
        assert stub.asked[-1][1] == f"Bearer {key}"


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, InvalidRequestError, "top_k is wrong"),
        (401, RemoteError, "QUIRE_API_KEY"),
        (404, RemoteError, "top_k is wrong"),
    ],
)
def test_an_error_of_the_server_is_told(
    stub: Stub, status: int, kind: type[QuireError], said: str
) -> None:
    stub.status, stub.body = status, {"error": {"message": "top_k is wrong"}}
    result = invoke("complete", "x", "--url", stub.url, "--model", "m")
    assert type(result.exception) is kind
    assert said in str(result.exception)
    assert stub.url in str(result.exception)


def test_a_stream_that_ends_too_early_is_an_error(stub: Stub) -> None:
    """Half an answer must not pass for a whole one."""
    stub.events, stub.breaks_off = [{"choices": [{"index": 0, "text": "half"}]}], True
    result = invoke("complete", "x", "--url", stub.url, "--model", "m")
    assert isinstance(result.exception, RemoteError)
    stub.events = [{"error": {"message": "the engine failed"}}]
    stub.breaks_off = False
    result = invoke("complete", "x", "--url", stub.url, "--model", "m")
    assert isinstance(result.exception, RemoteError)
    assert "the engine failed" in str(result.exception)


@pytest.mark.parametrize("events", [[], ["text"], [{"choices": ["text"]}], [{"choices": None}]])
@pytest.mark.parametrize("command", [("complete", "x"), ("chat",), ("complete", "x", "y")])
def test_what_is_no_answer_is_an_error(
    command: tuple[str, ...], stub: Stub, events: list[Any]
) -> None:
    """A stream that stops without its last event, and JSON of another kind, are no answers."""
    stub.events, stub.ends = events, []
    stub.body = {"choices": events} if events else {"hello": "there"}
    result = invoke(*command, "--url", stub.url, "--model", "m", stdin="hi\n")
    assert isinstance(result.exception, RemoteError)
    assert stub.url in str(result.exception)


@pytest.mark.parametrize("url", ["http://[x/v1", "http://localhost:99999/v1", "http:///v1"])
def test_a_url_and_a_key_that_cannot_be_are_named(url: str) -> None:
    result = invoke("complete", "x", "--url", url, "--model", "m")
    assert isinstance(result.exception, InvalidRequestError)
    assert "--url" in str(result.exception)
    result = invoke("complete", "x", "--url", "http://localhost", "--api-key", "k\u00e9y")
    assert isinstance(result.exception, InvalidRequestError)
    assert "--api-key" in str(result.exception)


@pytest.mark.parametrize("command", [("complete", "x"), ("chat",)])
def test_a_server_that_is_not_there_is_named(command: tuple[str, ...], stub: Stub) -> None:
    stub.close()
    result = invoke(*command, "--url", stub.url, stdin="hi\n")
    assert isinstance(result.exception, RemoteError)
    assert "no server answers" in str(result.exception)
    assert stub.url in str(result.exception)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "float32"], "--dtype"),
        (["--max-model-len", "9"], "--max-model-len"),
        (["--engine-arg", "block_size=8"], "--engine-arg"),
        (["--sampling-arg", "top_q=1"], "top_q"),
    ],
)
def test_what_a_server_cannot_be_told_is_wrong_usage(
    stub: Stub, options: list[str], named: str
) -> None:
    result = invoke("complete", "x", "--url", stub.url, *options)
    assert result.exit_code == 2
    assert named in result.stderr
    assert not stub.asked


def test_a_url_has_a_scheme() -> None:
    result = invoke("complete", "x", "--url", "localhost:8000")
    assert isinstance(result.exception, InvalidRequestError)
    assert "http://localhost:8000/v1" in str(result.exception)


def test_a_server_says_what_an_engine_here_says(served: Any) -> None:
    """The same options, the same text, streamed and as JSON; in a chat, over several turns."""
    here, there = ("--model", "quire/demo"), ("--url", served.url)
    greedy = ("--temperature", "0", "--max-tokens", "12")
    for command, said in (
        (("complete", "The capital of France is"), None),
        (("complete", "Once upon", "Two plus", "--n", "1"), None),
        (("chat", "--system", "You are kind."), "What is the capital of France?\nAnd of Italy?\n"),
    ):
        local, remote = (invoke(*command, *where, *greedy, stdin=said) for where in (here, there))
        assert remote.exit_code == 0, remote.output
        assert local.stdout == remote.stdout
        assert local.stdout.strip()
    wrong = invoke("complete", "x", *there, "--model", "nobody")
    assert isinstance(wrong.exception, RemoteError)
    assert "quire/demo" in str(wrong.exception)
