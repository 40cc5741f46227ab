"""ResultFile: the answers of a batch, a line each, which an interrupted run leaves whole."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from quire.errors import InvalidRequestError

_START = b'{"id":"batch_req_'  # of every line that is written here


class ResultFile:
    """The output of a batch, continued where an earlier run ended.

    Answers that succeeded stay; a last line that was not written to its end is cut off, and
    what failed is taken out, to be asked anew. A line is written by one call, so that whatever ends
    the process leaves at most the last one incomplete.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    resume : bool
        False begins with an empty file.

    Attributes
    ----------
    finished : frozenset of str
        The ``custom_id`` of each answer that was there already.

    Raises
    ------
    InvalidRequestError
        The file holds something else than a batch's output, or another process writes it.
    """

    def __init__(self, path: Path, *, resume: bool = True) -> None:
        self._path = path
        self._file = self._open(resume)
        try:
            self.finished = self._repair()
        except BaseException:
            self._file.close()
            raise

    def _open(self, resume: bool) -> Any:
        file = self._path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InvalidRequestError(f"{self._path} is being written by another process") from None
        if not resume:
            file.truncate(0)
        return file

    def _repair(self) -> frozenset[str]:
        """Leave what succeeded, and return the names."""
        finished: set[str] = set()
        kept: list[int] = []
        number = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is None and not _is_torn(line):
                    raise InvalidRequestError(
                        f"{self._path}: line {number} is no answer of a batch; name another "
                        "file, or let this one be overwritten"
                    )
                if record is not None and line.endswith(b"\n") and _succeeded(record):
                    if record["custom_id"] not in finished:
                        kept.append(number)
                    finished.add(record["custom_id"])
        if len(kept) < number:
            self._keep(kept)
        return frozenset(finished)

    def _keep(self, numbers: list[int]) -> None:
        """Put a file of these lines in this one's place, so that no moment has half of it."""
        new = self._path.with_name(self._path.name + ".part")
        wanted = set(numbers)
        with self._path.open("rb") as old, new.open("wb") as file:
            file.writelines(line for number, line in enumerate(old, start=1) if number in wanted)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        self._file.close()
        self._file = self._open(resume=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append an answer."""
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        # Half of a surrogate pair has no UTF-8, but an escape that JSON has, too.
        left = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
        while left:
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Leave everything on the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a line of ours, which nobody wrote to its end."""
    most = min(len(line), len(_START))
    return not line.endswith(b"\n") and line[:most] == _START[:most]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and {"custom_id", "response", "error"} <= record.keys():
        return record
    return None


def _succeeded(record: dict[str, Any]) -> bool:
    response = record["response"]
    if not isinstance(record["custom_id"], str) or not isinstance(response, dict):
        return False
    status = response.get("status_code")
    return isinstance(status, int) and 200 <= status < 300
