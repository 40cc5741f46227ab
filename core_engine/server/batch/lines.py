"""Lines: what a batch file asks for, and where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""The endpoints that a line may name."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch file.

    Attributes
    ----------
    number : int
        Of its line, from 1.
    custom_id : str
        The caller's name for it.
    url : str
        One of :data:`URLS`.
    body : dict
    """

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that is no request.

    Attributes
    ----------
    number : int
        From 1.
    custom_id : str or None
        If it has one that is its own.
    message : str
        What is wrong with it.
    """

    number: int
    custom_id: str | None
    message: str


def count_lines(path: Path) -> int:
    """Return how many lines have something on them."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_lines(path: Path) -> Iterator[BatchRequest | BrokenLine]:
    """Yield a file's requests as they are asked for; a line that is broken stops no other.

    Parameters
    ----------
    path : Path
        JSON lines: ``{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}``. Empty lines
        are passed over.
    """
    first_seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            read = _read(number, line)
            if isinstance(read, BatchRequest):
                earlier = first_seen.setdefault(read.custom_id, number)
                if earlier != number:
                    message = f"custom_id {read.custom_id!r} is that of line {earlier}, too"
                    read = BrokenLine(number, None, message)
            yield read


def _read(number: int, line: bytes) -> BatchRequest | BrokenLine:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BrokenLine(number, None, f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return BrokenLine(number, None, f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return BrokenLine(number, None, f"not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return BrokenLine(number, None, "not a JSON object")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BrokenLine(number, None, f"custom_id must be a text, not {custom_id!r}")
    message = _problem(record)
    if message is not None:
        return BrokenLine(number, custom_id, message)
    return BatchRequest(number, custom_id, record["url"], record["body"])


def _problem(record: dict[str, Any]) -> str | None:
    method, url, body = record.get("method", "POST"), record.get("url"), record.get("body")
    if method != "POST":
        return f"method must be 'POST', not {method!r}"
    if url not in URLS:
        return f"url must be one of {', '.join(URLS)}, not {url!r}"
    if not isinstance(body, dict):
        return f"body must be an object, not {type(body).__name__}"
    if body.get("stream"):
        return "body.stream must be false or left out: an answer is written when it is complete"
    return None
