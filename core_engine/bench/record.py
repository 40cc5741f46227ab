"""Record: who was measured, with what, and what came out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.bench import report
from quire.bench.contest import Contestant, Measurement, alternate
from quire.bench.limit import Limit, ModelSize, measure_limit
from quire.bench.workload import Workload, uniform
from quire.utils.threads import count_threads


@dataclass(frozen=True, slots=True)
class Entry:
    """A side that takes part.

    Attributes
    ----------
    label : str
        What tables call it.
    side : str
        One of :data:`quire.bench.sides.SIDES`.
    model : str
        The folder or file that it loads.
    options : dict
        Keyword arguments of the side.
    python : str
        The interpreter that runs it.
    environment : mapping of str to str
        Variables that it gets beside ours.
    """

    label: str
    side: str
    model: str
    options: dict[str, Any]
    python: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A workload, the sides that ran it, and what this machine could do at most.

    Attributes
    ----------
    model : str
        As it was asked for.
    workload : Workload
    entries : list of Entry
    versions : list of dict
        Of each side.
    measurements : list of Measurement
        Of each side.
    limit : Limit
    size : ModelSize
    """

    model: str
    workload: Workload
    entries: list[Entry]
    versions: list[dict[str, str]]
    measurements: list[Measurement]
    limit: Limit
    size: ModelSize

    @property
    def num_later_tokens(self) -> int:
        """Generated tokens but for each prompt's first."""
        return self.workload.num_output_tokens - len(self.workload.prompts)

    @property
    def limit_seconds(self) -> float:
        """The least time for the workload."""
        return self.limit.seconds(self.workload, self.size)

    @property
    def limit_first_token_seconds(self) -> float:
        """The least time until all prompts are computed."""
        return self.limit.first_token_seconds(self.workload, self.size)

    @property
    def limit_decode_rate(self) -> float:
        """Tokens per second after the first, at most."""
        return self.num_later_tokens / (self.limit_seconds - self.limit_first_token_seconds)

    def document(self) -> dict[str, Any]:
        """Return everything, for a JSON file."""
        sides = {
            entry.label: {
                "side": entry.side,
                "model": entry.model,
                "versions": versions,
                "options": entry.options,
                "python": entry.python,
                "environment": dict(entry.environment),
            }
            for entry, versions in zip(self.entries, self.versions, strict=True)
        }
        limit = {
            "bytes_per_second": self.limit.bytes_per_second,
            "flops": self.limit.flops,
            "seconds": self.limit_seconds,
            "first_token_seconds": self.limit_first_token_seconds,
        }
        return {
            "model": self.model,
            "workload": self.workload.name,
            "output_tokens": self.workload.num_output_tokens,
            "machine": report.machine(),
            "sides": sides,
            "limit": limit,
            "runs": {each.label: each.runs for each in self.measurements},
        }

    def write(self, path: Path) -> None:
        """Write the document to a JSON file."""
        path.write_text(json.dumps(self.document(), indent=2) + "\n", encoding="utf-8")

    def sides_table(self) -> str:
        """Return each side's versions and options as a table."""
        rows = [["side", "versions", "options"]]
        for entry, versions in zip(self.entries, self.versions, strict=True):
            options = {**entry.options, **entry.environment}
            rows.append(
                [
                    entry.label,
                    ", ".join(f"{name} {version}" for name, version in versions.items()),
                    ", ".join(f"{name}={value}" for name, value in options.items()),
                ]
            )
        return report.table(rows)


def record(
    model: str,
    folder: Path,
    vocab_size: int,
    workload: Workload,
    entries: list[Entry],
    repeats: int,
    say: Callable[[str], None],
) -> Record:
    """Let the sides run a workload in turns, then measure the machine's limit.

    Parameters
    ----------
    model : str
        As it was asked for.
    folder : Path
        Where it lies.
    vocab_size : int
    workload : Workload
    entries : list of Entry
    repeats : int
        Counted runs of each side.
    say : callable
        Told what goes on, line by line.
    """
    with ExitStack() as stack:
        contestants = [
            stack.enter_context(
                Contestant(e.label, e.side, e.model, e.options, e.python, e.environment)
            )
            for e in entries
        ]
        say(f"{model}, {workload.name}; {json.dumps(report.machine())}")
        measurements = alternate(
            contestants,
            workload,
            repeats=repeats,
            warmup=uniform(2, 16, 4, vocab_size=vocab_size),
            on_run=lambda label, figures: say(f"  {label}: {figures['seconds']:.2f} s"),
        )
        versions = [contestant.versions for contestant in contestants]
    limit = measure_limit(count_threads())
    size = ModelSize.of(folder, vocab_size)
    done = Record(model, workload, entries, versions, measurements, limit, size)
    for measurement in measurements:
        add_rates(measurement, workload.num_output_tokens, done.num_later_tokens)
    return done


def add_rates(measurement: Measurement, num_tokens: int, num_later: int) -> None:
    """Derive tokens per second: of all, and of those after the first where a side told when."""
    runs = measurement.runs
    runs["output_tokens_per_second"] = [num_tokens / seconds for seconds in runs["seconds"]]
    if num_later and "first_token_seconds" in runs:
        times = zip(runs["seconds"], runs["first_token_seconds"], strict=True)
        runs["decode_tokens_per_second"] = [num_later / (all_ - first) for all_, first in times]
