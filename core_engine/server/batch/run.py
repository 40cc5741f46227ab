"""Run a batch: every line through the application, as many at once as the engine has room for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from quire.errors import EngineClosedError
from quire.server.batch.call import Answer, Application, post
from quire.server.batch.lines import BatchRequest, BrokenLine
from quire.server.batch.results import ResultFile

_LONGEST_WAIT = 5.0  # seconds, for an engine that is busy


@dataclass(slots=True)
class Summary:
    """How a batch went.

    Attributes
    ----------
    succeeded, failed : int
        Lines of this run.
    skipped : int
        Lines that an earlier run had answered.
    """

    succeeded: int = 0
    failed: int = 0
    skipped: int = 0


async def run_batch(
    app: Application,
    lines: Iterator[BatchRequest | BrokenLine],
    results: ResultFile,
    *,
    concurrency: int,
    advance: Callable[[Summary], None] = lambda summary: None,
    complain: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Answer the lines of a batch file.

    Parameters
    ----------
    app : ASGI application
    lines : iterator
        Read only as far as there is work for.
    results : ResultFile
        Gets each answer as soon as it is there.
    concurrency : int
        Requests at once.
    advance : callable
        Told after every line.
    complain : callable
        Told of each line that failed.

    Raises
    ------
    EngineClosedError
        The engine is gone; what has no answer is left for the next run.
    """
    summary = Summary()

    async def work() -> None:
        for line in lines:  # shared by all workers: each line goes to one
            if isinstance(line, BatchRequest) and line.custom_id in results.finished:
                summary.skipped += 1
            else:
                await answer(line)
            advance(summary)

    async def answer(line: BatchRequest | BrokenLine) -> None:
        problem: str | None
        if isinstance(line, BrokenLine):
            record, problem = _broken(line), line.message
        else:
            record = await _ask(app, line)
            problem = _problem(record)
        results.write(record)
        if problem is None:
            summary.succeeded += 1
        else:
            summary.failed += 1
            name = "" if line.custom_id is None else f" ({line.custom_id})"
            complain(f"line {line.number}{name}: {problem}")

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return summary


async def _ask(app: Application, request: BatchRequest) -> dict[str, Any]:
    body = json.dumps(request.body).encode("ascii")
    while True:
        got = await post(app, request.url, body)
        content = _content(got)
        code = _error(content).get("code")
        if code == "engine_closed":
            raise EngineClosedError(_error(content).get("message") or "the engine was closed")
        if got.status != HTTPStatus.SERVICE_UNAVAILABLE or "retry-after" not in got.headers:
            break
        # The engine has other work: a batch has time.
        await asyncio.sleep(min(_seconds(got.headers["retry-after"]), _LONGEST_WAIT))
    name = got.headers.get("x-request-id") or uuid4().hex
    response = {"status_code": got.status, "request_id": name, "body": content}
    return {
        "id": f"batch_req_{uuid4().hex}",
        "custom_id": request.custom_id,
        "response": response,
        "error": None,
    }


def _broken(line: BrokenLine) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid4().hex}",
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": "invalid_line", "message": line.message, "line": line.number},
    }


def _content(got: Answer) -> Any:
    try:
        return json.loads(got.body)
    except ValueError:
        return got.body.decode("utf-8", "replace")


def _error(content: Any) -> dict[str, Any]:
    error = content.get("error") if isinstance(content, dict) else None
    return error if isinstance(error, dict) else {}


def _problem(record: dict[str, Any]) -> str | None:
    """Return what a request failed by, or None."""
    response = record["response"]
    if 200 <= response["status_code"] < 300:
        return None
    message = _error(response["body"]).get("message") or response["body"]
    return f"{response['status_code']}: {message}"


def _seconds(text: str) -> float:
    try:
        return max(float(text), 0.0)
    except ValueError:
        return 1.0
