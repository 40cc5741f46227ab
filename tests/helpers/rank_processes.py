"""RankProcess: a process that shares memory with the test that started it.

It runs `part(memory, **arguments)` of a module of these, and prints what it returned.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from quire.errors import RankError
from quire.parallel.shared_memory import SharedMemory

HELPERS = Path(__file__).resolve().parent


class RankProcess:
    """One process, and what became of it."""

    def __init__(self, memory: SharedMemory, rank: int, part: str, **arguments: Any) -> None:
        environment = dict(os.environ)
        paths = [str(HELPERS), *sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["OMP_NUM_THREADS"] = "1"
        self.rank = rank
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "rank_processes",
                str(memory.fd),
                str(rank),
                part,
                json.dumps(arguments),
            ],
            pass_fds=[memory.fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_until_ready(self) -> None:
        """Wait until it says that it is."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def result(self, timeout: float = 120) -> Any:
        """Wait for its end; what it returned, or the error that it ended with as a dict."""
        out, err = self.process.communicate(timeout=timeout)
        assert out, f"rank {self.rank} ended with {self.process.returncode}: {err}"
        return json.loads(out.splitlines()[-1])


def run_ranks(
    memory: SharedMemory,
    part: str,
    ranks: range,
    beside: threading.Thread | None = None,
    **arguments: Any,
) -> list[Any]:
    """Run ranks side by side, perhaps beside a thread, and return what each returned."""
    started = [RankProcess(memory, rank, part, **arguments) for rank in ranks]
    try:
        if beside is not None:
            beside.start()
        results = [each.result() for each in started]
        if beside is not None:
            beside.join()
        return results
    finally:
        for each in started:
            each.process.kill()
            each.process.communicate()


def main() -> None:
    """Be one of them."""
    fd, rank, part, arguments = sys.argv[1:]
    module, _, name = part.partition(":")
    function = getattr(importlib.import_module(module), name)
    options = json.loads(arguments)
    memory = SharedMemory.attach(int(fd))
    memory.join(int(rank), patience=options.pop("patience", 60.0))
    begin = time.monotonic()
    try:
        result = function(memory, **options)
    except RankError as error:
        seconds = time.monotonic() - begin
        result = {"lost": error.rank, "why": error.why, "seconds": seconds}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
