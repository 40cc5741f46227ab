"""A real server process, and the fixtures that tests share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest


class ServerProcess:
    """``quire serve`` in a process of its own, on a free port of the loopback.

    Parameters
    ----------
    *args : str
        The command line after ``quire serve``.
    env : dict, optional
        Added to this process's environment.
    timeout : float
        Seconds that it has to start.
    port : int
        Another than a free one.
    """

    def __init__(
        self, *args: str, env: dict[str, str] | None = None, timeout: float = 120, port: int = 0
    ) -> None:
        self.api_key = "EMPTY"
        command = [sys.executable, "-m", "quire.server", *args, "--port", str(port)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self.lines: list[str] = []
        self._found = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._found.wait(timeout) or not self.url:
            self.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line)
                match = re.search(r"running on (https?://\S+)", line)
                if match and not self.url:
                    self.url = match[1]
                    self._found.set()
        self._found.set()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return "".join(self.lines)

    def stop(self, how: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Signal the process, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        started = time.monotonic()
        try:
            code = self.process.wait(timeout)
            self._reader.join(timeout)
            return code
        except subprocess.TimeoutExpired:
            self.kill()
            seconds = time.monotonic() - started
            raise RuntimeError(f"the server still ran after {seconds:.0f} s:\n{self.log}") from None

    def kill(self) -> None:
        """End the process, whatever it does; what has ended stays so."""
        self.process.kill()
        self.process.wait()
        self._reader.join()


@pytest.fixture(scope="session")
def served() -> Iterator[ServerProcess]:
    """``quire/demo``, served in a process of its own; ``.url`` has no ``/v1`` at its end."""
    server = ServerProcess("quire/demo")
    yield server
    server.stop()
