"""Contest: sides in processes of their own run the same workload in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from quire.bench.workload import Workload
from quire.errors import QuireError


class BenchError(QuireError):
    """A side that could not be started or could not run a workload."""


@dataclass(slots=True)
class Measurement:
    """What one side showed over all its runs.

    Attributes
    ----------
    label : str
    runs : dict of str to list of float
        Every figure of every run, in order.
    """

    label: str
    runs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        """Record one run."""
        for name, value in figures.items():
            self.runs.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Return the median of a figure."""
        return statistics.median(self.runs[name])

    def spread(self, name: str) -> tuple[float, float]:
        """Return the least and the greatest of a figure."""
        return min(self.runs[name]), max(self.runs[name])


_START = """
import sys, types
try:
    import quire
except ImportError:  # a peer's environment: the benchmark's own modules need nothing of the rest
    quire = sys.modules["quire"] = types.ModuleType("quire")
    quire.__path__ = [sys.argv[1]]
from quire.bench.worker import main
main()
"""


class Contestant:
    """A side's process.

    Parameters
    ----------
    label : str
        What the side is called in tables.
    side : str
        One of :data:`quire.bench.sides.SIDES`.
    model : str
    options : dict
        Keyword arguments of the side.
    python : str
        The interpreter, and with it the environment, that runs it; quire need not be installed
        there.
    environment : mapping of str to str, optional
        Variables that it gets beside ours.
    """

    def __init__(
        self,
        label: str,
        side: str,
        model: str,
        options: dict[str, Any] | None = None,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.label = label
        self._process = subprocess.Popen(
            [python, "-c", _START, str(Path(__file__).resolve().parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self._send({"side": side, "model": model, "options": options or {}})
            self.versions: dict[str, str] = self._receive()["versions"]
        except BaseException:
            self.close()
            raise

    def run(self, workload: Workload) -> dict[str, float]:
        """Run a workload once."""
        self._send(dataclasses.asdict(workload))
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.label}: its process ended with {self._process.wait()}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise BenchError(f"{self.label}: {message['error']}")
        return message

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def alternate(
    contestants: Iterable[Contestant],
    workload: Workload,
    *,
    repeats: int,
    warmup: Workload | None = None,
    on_run: Callable[[str, dict[str, float]], None] | None = None,
) -> list[Measurement]:
    """Let the sides run a workload in turns: A B A B ...

    Parameters
    ----------
    contestants : iterable of Contestant
    workload : Workload
    repeats : int
        Runs per side.
    warmup : Workload, optional
        Run once by each side first, and not counted.
    on_run : callable, optional
        Told of every counted run.
    """
    contestants = list(contestants)
    measurements = [Measurement(c.label) for c in contestants]
    if warmup is not None:
        for contestant in contestants:
            contestant.run(warmup)
    for _ in range(repeats):
        for contestant, measurement in zip(contestants, measurements, strict=True):
            figures = contestant.run(workload)
            measurement.add(figures)
            if on_run is not None:
                on_run(contestant.label, figures)
    return measurements
