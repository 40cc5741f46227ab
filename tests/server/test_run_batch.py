"""Batch files: every request is answered once, whatever happens to the process meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

pytest.importorskip("fastapi", reason="fastapi is in the extras 'server' and 'dev'")

from quire.cli.app import app as command
from quire.errors import EngineClosedError, InvalidRequestError
from quire.server.batch.lines import BatchRequest, BrokenLine, read_lines
from quire.server.batch.results import ResultFile
from quire.server.batch.run import run_batch

URL = "/v1/completions"


def line(custom_id: Any, url: str = URL, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    texts = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines)
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_bytes().splitlines()]


class Echo:
    """An application that answers with what it was asked, and counts."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.running = self.most = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        status, headers, answer = self.answer(body)
        headers.append((b"x-request-id", b"req-1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        data = json.dumps(answer).encode()
        await send({"type": "http.response.body", "body": data[:3], "more_body": True})
        await send({"type": "http.response.body", "body": data[3:]})

    def answer(self, body: Any) -> tuple[int, list[Any], Any]:
        status = body.get("status", 200)
        if status != 200:
            return status, [], {"error": {"message": "no", "code": body.get("code")}}
        return 200, [], {"echo": body}


def run(app: Any, source: Path, target: Path, concurrency: int = 4, resume: bool = True) -> Any:
    complaints: list[str] = []
    with ResultFile(target, resume=resume) as results:
        summary = asyncio.run(
            run_batch(
                app,
                read_lines(source),
                results,
                concurrency=concurrency,
                complain=complaints.append,
            )
        )
    return summary, complaints


def test_an_answer_has_the_shape_that_batches_have(tmp_path: Path) -> None:
    """OpenAI's: id, custom_id, response with status, request id and body, error."""
    source = write(tmp_path / "in", line("a", prompt="\ud800 é"))
    run(Echo(), source, tmp_path / "out")
    [record] = read(tmp_path / "out")
    assert record.pop("id").startswith("batch_req_")
    assert record == {
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req-1",
            "body": {"echo": {"prompt": "\ud800 é"}},
        },
        "error": None,
    }


def test_as_many_run_at_once_as_are_allowed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line(str(i)) for i in range(50)))
    echo = Echo()
    summary, _ = run(echo, source, tmp_path / "out", concurrency=7)
    assert (summary.succeeded, echo.most) == (50, 7)


def test_a_broken_line_fails_alone_and_by_its_number(tmp_path: Path) -> None:
    """Neither bytes, syntax, depth nor a field of one line keep the others from their answers."""
    source = write(
        tmp_path / "in",
        line("good"),
        b"\xff\xfe",
        b"{nothing",
        b"[" * 100_000,
        b"",
        [1],
        line(7),
        line("good"),
        line("url", "/v1/else"),
        {**line("method"), "method": "GET"},
        {**line("body"), "body": "text"},
        line("stream", stream=True),
        line("refused", status=400),
        line("last"),
    )
    summary, complaints = run(Echo(), source, tmp_path / "out", concurrency=1)
    assert (summary.succeeded, summary.failed) == (2, 11)
    records = read(tmp_path / "out")
    assert [r["custom_id"] for r in records if r["error"] is None] == ["good", "refused", "last"]
    broken = {r["error"]["line"]: r["error"]["message"] for r in records if r["error"]}
    assert list(broken) == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert "line 1" in broken[8]
    for number in [*broken, 13]:
        assert any(text.startswith(f"line {number}") for text in complaints)


def test_a_busy_engine_is_waited_for_and_a_closed_one_ends_the_run(tmp_path: Path) -> None:
    """503 with Retry-After is no answer; without an engine the rest is left for the next run."""

    class Busy(Echo):
        def answer(self, body: Any) -> tuple[int, list[Any], Any]:
            if len(self.asked) < 3:
                return 503, [(b"retry-after", b"0")], {"error": {"code": "overloaded"}}
            return super().answer(body)

    source = write(tmp_path / "in", line("a"), line("b"))
    summary, _ = run(Busy(), source, tmp_path / "out")
    assert summary.succeeded == 2
    gone = write(tmp_path / "gone", line("c"), line("d", status=503, code="engine_closed"))
    with pytest.raises(EngineClosedError):
        run(Echo(), gone, tmp_path / "out", concurrency=1)
    assert {r["custom_id"] for r in read(tmp_path / "out")} == {"a", "b", "c"}


@given(data=st.data())
def test_a_run_goes_on_from_any_byte_that_an_earlier_one_reached(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever the output was cut, each request has one answer in the end; whole ones stay."""
    folder = tmp_path_factory.mktemp("batch")
    source = write(folder / "in", *(line(f"r{i}", prompt="é\n" * i) for i in range(6)))
    run(Echo(), source, folder / "out")
    content = (folder / "out").read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    (folder / "out").write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    echo = Echo()
    summary, _ = run(echo, source, folder / "out", concurrency=data.draw(st.integers(1, 4)))
    assert (summary.skipped, summary.succeeded, len(echo.asked)) == (whole, 6 - whole, 6 - whole)
    after = (folder / "out").read_bytes()
    assert after.startswith(b"".join(content.splitlines(keepends=True)[:whole]))
    assert sorted(r["custom_id"] for r in read(folder / "out")) == [f"r{i}" for i in range(6)]


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    """A corrected input is continued: its failures leave the output, its successes stay."""
    source = write(tmp_path / "in", line("a"), line("b", status=400), b"{")
    run(Echo(), source, tmp_path / "out")
    assert len(read(tmp_path / "out")) == 3
    echo = Echo()
    source = write(tmp_path / "in", line("a"), line("b"), line("c"))
    summary, _ = run(echo, source, tmp_path / "out")
    assert (summary.skipped, summary.succeeded, summary.failed) == (1, 2, 0)
    assert sorted(r["custom_id"] for r in read(tmp_path / "out")) == ["a", "b", "c"]
    run(echo, source, tmp_path / "out", resume=False)
    assert len(echo.asked) == 5


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": 1}\n', "text", '{"id":"x', "1\n2\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    """The output may be somebody's only copy of something."""
    target = tmp_path / "out"
    target.write_text(content)
    with pytest.raises(InvalidRequestError, match="line 1"):
        ResultFile(target)
    assert target.read_text() == content


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    with (
        ResultFile(tmp_path / "out"),
        pytest.raises(InvalidRequestError, match="another process"),
    ):
        ResultFile(tmp_path / "out")


def test_a_file_is_read_no_further_than_it_is_worked_on(tmp_path: Path) -> None:
    """A batch of any size fits in memory."""
    lines = read_lines(write(tmp_path / "in", line("a"), b"{"))
    assert isinstance(next(lines), BatchRequest)
    assert isinstance(next(lines), BrokenLine)


def invoke(source: Path, target: Path, *options: str) -> Result:
    arguments = ["run-batch", "-i", str(source), "-o", str(target), *options]
    return CliRunner().invoke(command, arguments)


def test_the_command_answers_as_the_server_does(tmp_path: Path) -> None:
    """Every endpoint, what it refuses, and a status that tells of failures until there are none."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    good = [
        line("chat", "/v1/chat/completions", model="quire/demo", messages=chat, temperature=0),
        line("text", prompt="Hello", max_tokens=3, temperature=0),
        line("vector", "/v1/embeddings", input=["a", "b"]),
        line("response", "/v1/responses", input="What is the capital of France?", temperature=0),
    ]
    bad = [line("nobody", model="nobody", prompt="x"), line("range", prompt="x", temperature=-1)]
    target = tmp_path / "out"
    result = invoke(write(tmp_path / "in", *good, *bad, b"{"), target)
    assert result.exit_code == 1, result.output
    assert "line 5 (nobody): 404" in result.stderr
    assert "line 6 (range): 400" in result.stderr
    assert "line 7: not JSON" in result.stderr
    assert "4 answered, 3 failed, 0 answered before" in result.stderr
    bodies = {r["custom_id"]: r["response"]["body"] for r in read(target) if r["response"]}
    assert "Paris" in bodies["chat"]["choices"][0]["message"]["content"]
    assert bodies["text"]["usage"]["completion_tokens"] <= 3
    assert len(bodies["vector"]["data"]) == 2
    assert bodies["response"]["object"] == "response"
    result = invoke(write(tmp_path / "in", *good), target)
    assert (result.exit_code, len(read(target))) == (0, 4)
    assert "0 answered, 0 failed, 4 answered before" in result.stderr


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    """The input as output, a folder that is not there, an output of something else."""
    source = write(tmp_path / "in", line("a"))
    for target in (source, tmp_path / "none" / "out"):
        result = invoke(source, target, "--model", str(tmp_path))
        assert result.exit_code == 2
        assert "--output-file" in result.stderr
    (tmp_path / "out").write_text("precious\n")
    result = invoke(source, tmp_path / "out", "--model", str(tmp_path))
    assert isinstance(result.exception, InvalidRequestError)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_loses_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """Whatever ends it in the middle: the same command goes on, and each request has one answer."""
    count = 300
    options = {"max_tokens": 60, "ignore_eos": True}
    source = write(
        tmp_path / "in", *(line(f"r{i}", prompt=f"Number {i}", **options) for i in range(count))
    )
    target = tmp_path / "out"
    words = ["run-batch", "-i", str(source), "-o", str(target), "--max-concurrency", "4"]
    arguments = [sys.executable, "-m", "quire", *words]
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not (target.exists() and target.stat().st_size > 3_000):
        time.sleep(0.01)
    first.send_signal(how)
    _, said = first.communicate(timeout=60)
    assert first.returncode == (130 if how is signal.SIGINT else -how), said
    before = target.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"{whole.count(bytes([10]))} answered before" in done.stderr
    assert 0 < whole.count(b"\n") < count
    assert target.read_bytes().startswith(whole)
    assert sorted(r["custom_id"] for r in read(target)) == sorted(f"r{i}" for i in range(count))
