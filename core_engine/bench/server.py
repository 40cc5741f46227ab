"""Server: `quire serve` in a process of its own, for a measurement."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from quire.bench.contest import BenchError


class Server:
    """A server on a free port of the loopback.

    Parameters
    ----------
    model : str
    args : sequence of str
        Further words of its command line.
    timeout : float
        Seconds that it has to start.

    Attributes
    ----------
    url : str
        With ``/v1`` at its end.
    """

    def __init__(self, model: str, args: Sequence[str] = (), timeout: float = 600) -> None:
        # Its first line is waited for, whatever QUIRE_LOG_LEVEL says.
        options = ["--port", "0", "--log-level", "info", *args]
        command = [sys.executable, "-m", "quire.server", model, *options]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._last: deque[str] = deque(maxlen=40)
        self._ready = threading.Event()
        self.url = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        if not self._ready.wait(timeout) or not self.url:
            self.close()
            raise BenchError("the server did not start:\n" + "".join(self._last))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line)
            found = re.search(r"running on (https?://\S+)", line)
            if found and not self.url:
                self.url = f"{found[1]}/v1"
                self._ready.set()
        self._ready.set()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
