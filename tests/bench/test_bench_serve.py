"""`quire bench serve`: what arrives is timed as it came, and the figures are those of the times."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from quire.bench import cli
from quire.bench.contest import BenchError, Measurement
from quire.bench.load import Target, Timing, draw_starts, run_load
from quire.bench.serving import add_comparison, figures_of, is_good, parse_goodput
from quire.bench.sse import parse_response
from quire.bench.workload import uniform

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


@given(data=st.data())
def test_an_event_arrives_with_its_last_byte(data: st.DataObject) -> None:
    """However chunks and packets are cut, and whether there are chunks at all."""
    count = data.draw(st.integers(1, 6))
    events = [b'data: {"i": %d}\n\n' % i for i in range(count)]
    body = b"".join(events) + b"data: [DONE]\n\n"
    if data.draw(st.booleans()):
        cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=5))
        raw = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(pieces(body, cuts))
    else:
        raw = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    packets = pieces(raw, data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    response = parse_response([(float(i), packet) for i, packet in enumerate(packets)])
    assert (response.status, response.body, response.is_complete) == (200, body, True)
    assert [event.data for event in response.events] == [{"i": i} for i in range(count)]
    seen = b""
    for event in response.events:
        # The bytes before the packet that it came with do not hold it to the end of its line.
        seen = b"".join(packets[: int(event.seconds)])
        whole = b"".join(packets[: int(event.seconds) + 1])
        text = b'"i": %d}' % event.data["i"]
        assert _plain(whole).count(text) == 1
        assert _plain(seen).count(text + b"\n") == 0
    cut = data.draw(st.integers(0, len(raw) - 1))
    end = raw.rindex(b"0\r\n\r\n") if b"chunked" in raw else len(raw)
    assert not parse_response([(0.0, raw[: min(cut, end)])]).is_complete


def _plain(raw: bytes) -> bytes:
    """The body in what came so far, where chunks end wherever they do."""
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found or b"chunked" not in head:
        return rest
    body = b""
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


def timing(*arrivals: float, tokens: int | None = None) -> Timing:
    return Timing(1.0, list(arrivals), arrivals[-1], tokens or len(arrivals))


def test_figures_are_those_of_the_times() -> None:
    figures = figures_of([timing(2.0, 2.5, 3.5), timing(4.0, 5.0)], {"ttft": 1500.0})
    assert figures["seconds"] == 4.0
    assert figures["output_tokens_per_second"] == 5 / 4
    assert figures["requests_per_second"] == 0.5
    assert figures["first_token_seconds"] == 2.0
    assert figures["gap_seconds_p50"] == 1.0
    assert figures["whole_seconds_p99"] == 4.0
    assert figures["good_share"] == 0.5
    assert figures["good_requests_per_second"] == 0.25
    assert "good_share" not in figures_of([timing(2.0)], {})


@pytest.mark.parametrize(
    ("limit", "is_kept"),
    [("ttft:1000", True), ("ttft:999", False), ("tpot:750", True), ("tpot:749", False),
     ("itl:1000", True), ("itl:999", False), ("e2e:2500", True), ("e2e:2499", False),
     ("ttft:1000 e2e:1", False)],
)  # fmt: skip
def test_a_good_request_keeps_all_limits(limit: str, is_kept: bool) -> None:
    assert is_good(timing(2.0, 2.5, 3.5), parse_goodput([limit])) is is_kept


@pytest.mark.parametrize("text", ["ttft", "x:1", "ttft:fast", "ttft:1,ttft:2"])
def test_a_limit_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="ttft:500"):
        parse_goodput([text])


def test_serving_is_compared_run_by_run() -> None:
    served = Measurement("served", {"seconds": [2.0, 4.0]})
    add_comparison(served, Measurement("offline", {"seconds": [1.0, 4.0]}), [100, 200])
    assert served.runs["of_offline"] == [0.5, 1.0]
    assert served.runs["overhead_ms_per_token"] == [10.0, 0.0]


def test_requests_begin_at_the_rate_that_is_asked_for() -> None:
    """As a Poisson process: in order, by the seed, and on average as often."""
    starts = draw_starts(4000, 50.0, 1)
    assert starts == draw_starts(4000, 50.0, 1) == sorted(starts)
    assert 0.9 < starts[-1] * 50 / 4000 < 1.1
    assert draw_starts(3, None, 1) == [0.0] * 3


class Stub:
    """A server of completions that counts who is there at once."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.paths: list[tuple[str, str | None]] = []
        self.running = self.most = 0
        self.status, self.lost, self.pause = 200, 0, 0.0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.respond([b'{"data": [{"id": "the model"}]}'], "application/json")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    stub.asked.append(body)
                    stub.paths.append((self.path, self.headers["authorization"]))
                    stub.running += 1
                    stub.most = max(stub.most, stub.running)
                count = body["max_tokens"] - stub.lost
                chunks: list[dict[str, Any]] = [{"choices": [{"text": "a"}]} for _ in range(count)]
                chunks.append({"choices": [], "usage": {"completion_tokens": count}})
                texts = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
                try:
                    self.respond([*texts, b"data: [DONE]\n\n"], "text/event-stream")
                finally:
                    with lock:
                        stub.running -= 1

            def respond(self, parts: list[bytes], kind: str) -> None:
                self.send_response(stub.status)
                self.send_header("content-type", kind)
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
                    time.sleep(stub.pause)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def test_tokens_are_timed_as_they_come(stub: Stub) -> None:
    """A pause between tokens is seen as one, of every request and no longer than the whole."""
    stub.pause = 0.02
    [one, two] = run_load(Target(stub.url, "m", "k"), uniform(2, 4, 5, vocab_size=100), [0, 0], 2)
    for each in (one, two):
        assert each.num_tokens == len(each.arrivals) == 5
        assert all(gap >= 0.01 for gap in each.gaps)
        assert each.whole >= each.first_token + 4 * 0.015
    assert stub.paths == [("/v1/completions", "Bearer k")] * 2
    assert stub.asked[0]["ignore_eos"] is True


def test_no_more_run_than_may(stub: Stub) -> None:
    stub.pause = 0.01
    run_load(Target(stub.url, "m"), uniform(6, 4, 2, vocab_size=100), [0] * 6, 2)
    assert stub.most == 2


def test_a_server_that_does_not_do_its_work_gives_no_figures(stub: Stub) -> None:
    """Fewer tokens, a refusal, nobody there: errors that say so."""
    target, work = Target(stub.url, "m"), uniform(1, 4, 5, vocab_size=100)
    stub.lost = 1
    with pytest.raises(BenchError, match="4 tokens, not 5"):
        run_load(target, work, [0], None)
    stub.lost, stub.status = 0, 503
    with pytest.raises(BenchError, match="503"):
        run_load(target, work, [0], None)
    stub.close()
    with pytest.raises(BenchError, match="no server answers"):
        run_load(target, work, [0], None)


def test_the_command_measures_a_server_that_runs(stub: Stub, tmp_path: Path) -> None:
    """Each run has prompts of its own; the file has every run."""
    file = tmp_path / "figures.json"
    result = run(
        "--url", stub.url, "--num-prompts", 3, "--input-len", 5, "--output-len", 4,
        "--request-rate", 500, "--goodput", "ttft:60000", "--repeats", 2, "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "goodput" in result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["request_rate"] == 500
    assert document["goodput_ms"] == {"ttft": 60000.0}
    assert document["output_tokens"] == [12, 12]
    runs = document["runs"]["served"]
    assert runs["good_share"] == [1.0, 1.0]
    assert all(len(values) == 2 for values in runs.values())
    assert len({tuple(body["prompt"]) for body in stub.asked}) == 9
    assert {body["model"] for body in stub.asked} == {"the model"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "prefix"], "--workload"),
        (["--dtype", "int8"], "--dtype"),
        (["--goodput", "speed:1"], "--goodput"),
        (["--url", "http://x/v1", "--server-arg=--y"], "--server-arg"),
        (["--url", "http://x/v1", "--offline"], "--model"),
        (["--url", "localhost:8000"], "--url"),
        (["--url", "http://localhost:99999/v1"], "--url"),
        (["--offline", "--request-rate", "3"], "--offline"),
        (["--model", "quire/demo", "--input-len", "2048"], "--input-len"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


@pytest.mark.slow
def test_the_command_starts_a_server_and_measures_the_engine_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests, in turns; the table has both."""
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "ERROR")  # nobody waits for a line that never comes
    pytest.importorskip("fastapi", reason="fastapi is in the extras 'server' and 'dev'")
    file = tmp_path / "figures.json"
    result = run(
        "--model", "quire/demo", "--num-prompts", 4, "--input-len", 16, "--output-len", 8,
        "--repeats", 1, "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert runs.keys() == {"served", "offline"}
    assert len(runs["served"]["of_offline"]) == 1
