"""A small server with OpenAI's completions API, whose answers say exactly what it was asked."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

PIECE = 20
"""Characters, and so tokens, of one event of a stream."""


@dataclasses.dataclass
class Recorded:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    broke_off: bool = False


@dataclasses.dataclass
class Scripted:
    """An answer that is given instead of the usual one, once."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    events: list[Any] | None = None
    """Of a stream, each a dict or raw bytes; ends without ``[DONE]``."""


class FakeOpenAI:
    """Serves ``models``; one character is one token.

    A prompt with ``BAD`` in it is refused with 400. A text names its prompt and everything of the
    request that decides it.
    """

    def __init__(self) -> None:
        self.models = ["m", "o"]
        self.keys: set[str] | None = None
        self.has_tokenize = True
        self.max_model_len: int | None = 1000
        self.event_seconds = 0.0
        self.silent_seconds = 0.0
        """How long it waits before an answer."""
        self.reverses = False
        """Whether choices come in another order than that of their indices."""
        self.requests: list[Recorded] = []
        self.script: list[Scripted] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.root = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.root}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def pause(self) -> None:
        """Let the server's threads run for a moment."""
        time.sleep(0.02)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the requests for completions."""
        return [r.body for r in self.requests if r.path.endswith("/completions")]

    def text(self, prompt: str, body: dict[str, Any], index: int) -> str:
        """Return what is answered to a prompt."""
        left_out = ("prompt", "stream", "stream_options", "n", "best_of", "user")
        kept = {k: v for k, v in sorted(body.items()) if k not in left_out and v is not None}
        return f"{prompt}|{json.dumps(kept, sort_keys=True)}|{index}"

    # -- answers ---------------------------------------------------------------------------------

    def answer(self, handler: _Handler, recorded: Recorded) -> None:
        if self.keys is not None:
            given = recorded.headers.get("authorization", "").removeprefix("Bearer ")
            if given not in self.keys:
                return handler.error(401, "the API key is not one of this server's")
        path = recorded.path.partition("?")[0]
        if path == "/v1/models":
            data = [
                {"id": m, "object": "model", "created": 1, "owned_by": "q"} for m in self.models
            ]
            if self.max_model_len is not None:
                data = [{**one, "max_model_len": self.max_model_len} for one in data]
            return handler.reply(200, {"object": "list", "data": data})
        if path == "/tokenize" and self.has_tokenize:
            tokens = [1, *recorded.body["prompt"].encode()]
            return handler.reply(
                200,
                {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens},
            )
        if path != "/v1/completions":
            return handler.reply(404, {"detail": "Not Found"})
        if self.script:
            scripted = self.script.pop(0)
            if scripted.events is not None:
                return handler.stream(recorded, iter(scripted.events), done=False)
            return handler.reply(scripted.status, scripted.body, scripted.headers)
        body = recorded.body
        if body["model"] not in self.models:
            return handler.error(404, f"The model `{body['model']}` does not exist.")
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        for prompt in prompts:
            if "BAD" in prompt:
                return handler.error(400, "the prompt is BAD", param="prompt")
            if self.max_model_len is not None and len(prompt) > self.max_model_len:
                return handler.error(
                    400, f"This model's maximum context length is {self.max_model_len} tokens."
                )
        if body.get("stream"):
            handler.stream(recorded, self._events(prompts[0], body), done=True)
        else:
            handler.reply(200, self._completion(prompts, body))
        return None

    def _completion(self, prompts: list[str], body: dict[str, Any]) -> dict[str, Any]:
        n = body.get("n") or 1
        choices = []
        for i, prompt in enumerate(prompts):
            for j in range(n):
                text = self.text(prompt, body, j)
                choices.append(self._choice(i * n + j, text, body, "stop"))
        shown = choices[::-1] if self.reverses else choices
        return {**self._shell(body), "choices": shown, "usage": _usage(prompts, choices)}

    def _events(self, prompt: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text = self.text(prompt, body, 0)
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        for i, piece in enumerate(pieces):
            end = "stop" if i == len(pieces) - 1 else None
            yield {**self._shell(body), "choices": [self._choice(0, piece, body, end)]}
            time.sleep(self.event_seconds)
        if (body.get("stream_options") or {}).get("include_usage"):
            choice = self._choice(0, text, body, "stop")
            yield {**self._shell(body), "choices": [], "usage": _usage([prompt], [choice])}

    def _shell(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": body["model"],
            "system_fingerprint": "fp",
        }

    def _choice(
        self, index: int, text: str, body: dict[str, Any], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if body.get("logprobs") is not None:
            logprobs = {
                "tokens": list(text),
                "token_logprobs": [-0.5] * len(text),
                "top_logprobs": [{c: -0.5} for c in text],
                "text_offset": list(range(len(text))),
            }
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**choice, "stop_reason": "."} if finish else choice

    def _handler(self) -> type[_Handler]:
        return type("Handler", (_Handler,), {"fake": self})


def _usage(prompts: list[str], choices: list[dict[str, Any]]) -> dict[str, Any]:
    prompt = sum(map(len, prompts))
    completion = sum(len(choice["text"]) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeOpenAI

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._handle(json.loads(raw))

    def _handle(self, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        recorded = Recorded(self.path, headers, body)
        self.fake.requests.append(recorded)
        time.sleep(self.fake.silent_seconds)
        try:
            self.fake.answer(self, recorded)
        except OSError:  # the client is gone
            recorded.broke_off = self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def error(self, status: int, message: str, param: str | None = None) -> None:
        error = {"message": message, "type": "t", "param": param, "code": None}
        self.reply(status, {"error": error})

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/html" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(raw)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def stream(self, recorded: Recorded, events: Iterator[Any], done: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                if event is None:  # the server dies
                    self.close_connection = True
                    return
                is_raw = isinstance(event, bytes)
                self._chunk(event if is_raw else f"data: {json.dumps(event)}\n\n".encode())
            if done:
                self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            recorded.broke_off = True
            self.close_connection = True

    def _chunk(self, raw: bytes) -> None:
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()


@pytest.fixture
def remote() -> Iterator[FakeOpenAI]:
    """Return a server of completions in a thread."""
    server = FakeOpenAI()
    yield server
    server.close()
