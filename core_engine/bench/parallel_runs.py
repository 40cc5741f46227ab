"""Runs of one model on one rank and on two, in turns, beside what this machine can do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from quire.bench.contest import Contestant, Measurement
from quire.bench.exchange_probe import ExchangeProbe
from quire.bench.limit import measure_limit
from quire.bench.parallel_model import Machine
from quire.bench.ranks_side import COUNTS
from quire.bench.traffic import Shape, Traffic, rank_traffic
from quire.bench.workload import Workload
from quire.parallel.place import Place

RATE = "tokens_per_second"
STEP_MS = "step_ms"
OVERHEAD_MS = "overhead_ms"
EXCHANGE_MS = "exchange_ms"
SHARE = "exchange_share"
WAITING = "waiting_share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A way to spread a model.

    Attributes
    ----------
    label : str
    threads : int
        Of all ranks together.
    tensor_size, num_stages : int
    replicas : int
        Engines that share the prompts.
    """

    label: str
    threads: int
    tensor_size: int = 1
    num_stages: int = 1
    replicas: int = 1

    @property
    def places(self) -> list[Place]:
        """Where each rank stands."""
        size, stages = self.tensor_size, self.num_stages
        return [Place.of_rank(rank, size, stages) for rank in range(size * stages)]


def divisions(num_threads: int, with_ranks: bool) -> list[Division]:
    """Return the sides: one process with all threads and with half of them, and two processes."""
    half = max(1, num_threads // 2)
    each = f"{half} thread{'s' if half > 1 else ''}"
    made = []
    if num_threads > half:
        made.append(Division(label=f"1 process, {num_threads} threads", threads=num_threads))
    made.append(Division(label=f"1 process, {each}", threads=half))
    if with_ranks:
        made.append(Division(label=f"TP=2, {each} each", threads=2 * half, tensor_size=2))
        made.append(Division(label=f"PP=2, {each} each", threads=2 * half, num_stages=2))
    made.append(Division(label=f"2 replicas, {each} each", threads=half, replicas=2))
    return made


@dataclass(slots=True)
class Done:
    """What came of a workload.

    Attributes
    ----------
    workload : Workload
    measurements : list of (Division, Measurement)
    """

    workload: Workload
    measurements: list[tuple[Division, Measurement]]

    @property
    def is_decode(self) -> bool:
        """Whether each step computes one token of each prompt."""
        return max(self.workload.output_lens) > 1

    def prompts_of(self, division: Division) -> int:
        """Return how many prompts an engine of a side has at once."""
        return len(self.workload.prompts) // division.replicas

    def step_tokens(self, division: Division) -> int:
        """Return how many tokens a step computes."""
        count = self.prompts_of(division)
        return count if self.is_decode else count * len(self.workload.prompts[0])


@dataclass(slots=True)
class Hardware:
    """What this machine could do in each turn, with all of the threads and with half of them.

    Attributes
    ----------
    measured : Measurement
        ``read_all``, ``read_half``: bytes per second; ``flops_all``, ``flops_half``; of two
        processes that add up numbers ``latency``, in seconds, and ``link``, in bytes per second.
    """

    measured: Measurement = field(default_factory=lambda: Measurement("machine"))

    def of_rank(self, division: Division, overhead: float) -> Machine:
        """Return what a rank has of it while all ranks compute that do so at a time."""
        runs, median = self.measured.runs, self.measured.median
        at_once = division.tensor_size * division.replicas
        alone = division.num_stages > 1 or (at_once == 1 and not self._has_all(division))
        kind = "half" if alone else "all"
        return Machine(
            bandwidth=median(f"read_{kind}") / at_once,
            flops=median(f"flops_{kind}") / at_once,
            link=median("link") if "link" in runs else float("inf"),
            latency=median("latency") if "latency" in runs else 0.0,
            overhead=overhead,
        )

    def _has_all(self, division: Division) -> bool:
        return division.threads == self.measured.runs["threads"][0]


def measure_ranks(
    folder: str,
    sides: Sequence[Division],
    workloads: Sequence[Workload],
    options: dict[str, Any],
    *,
    num_threads: int,
    probe_numbers: int,
    repeats: int,
    say: Callable[[str], None],
) -> tuple[list[Done], Hardware, dict[str, str]]:
    """Let all sides run all workloads in turns, and measure the machine in each.

    Parameters
    ----------
    folder
        The model's.
    sides
    workloads
        A workload of one prompt is not for replicas.
    options
        Engine arguments of all.
    num_threads
        All that there are.
    probe_numbers
        Of an exchange that tells how fast many are added up.
    repeats
        Counted turns; one more comes before them.
    say

    Returns
    -------
    list of Done
    Hardware
    dict
        Versions.
    """
    hardware = Hardware()
    done = [Done(w, [(d, Measurement(d.label)) for d in _those_for(w, sides)]) for w in workloads]
    half = max(1, num_threads // 2)
    with ExitStack() as stack:
        opened = {}
        for division in sides:
            opened[division.label] = stack.enter_context(_engines(division, folder, options))
            say(f"  {division.label}: loaded")
        has_ranks = any(len(division.places) > 1 for division in sides)
        probe = stack.enter_context(ExchangeProbe(probe_numbers)) if has_ranks else None
        for turn in range(repeats + 1):
            figures = {"threads": float(num_threads)}
            for kind, count in (("all", num_threads), ("half", half)):
                limit = measure_limit(count)
                figures[f"read_{kind}"] = limit.bytes_per_second
                figures[f"flops_{kind}"] = limit.flops
            if probe is not None:
                figures["latency"], figures["link"] = probe.measure()
            if turn:
                hardware.measured.add(figures)
            for each in done:
                for division, measurement in each.measurements:
                    ran = _run(opened[division.label], each.workload)
                    if turn:
                        measurement.add(_with_rates(ran, each.is_decode))
            say(f"  turn {turn} of {repeats}" if turn else "  warm")
        versions = opened[sides[0].label][0].versions
    return done, hardware, versions


def _those_for(workload: Workload, sides: Sequence[Division]) -> list[Division]:
    return [each for each in sides if len(workload.prompts) % each.replicas == 0]


@contextmanager
def _engines(
    division: Division, folder: str, options: dict[str, Any]
) -> Iterator[list[Contestant]]:
    """Start a side's engines, one for each replica."""
    own = dict(options)
    if division.tensor_size > 1:
        own["tensor_parallel_size"] = division.tensor_size
    if division.num_stages > 1:
        own["pipeline_parallel_size"] = division.num_stages
    environment = {"OMP_NUM_THREADS": str(division.threads)}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Contestant(division.label, "quire-ranks", folder, own, sys.executable, environment)
            )
            for _ in range(division.replicas)
        ]


def _run(engines: list[Contestant], workload: Workload) -> dict[str, float]:
    """Share the prompts out, and return the figures of the engine that took longest."""
    count = len(engines)
    if count == 1:
        return engines[0].run(workload)
    parts = [
        replace(
            workload, prompts=workload.prompts[i::count], output_lens=workload.output_lens[i::count]
        )
        for i in range(count)
    ]
    with ThreadPoolExecutor(count) as threads:
        ran = list(threads.map(lambda pair: pair[0].run(pair[1]), zip(engines, parts, strict=True)))
    longest = max(ran, key=lambda figures: figures["seconds"])
    totals = {
        name: sum(figures[name] for figures in ran)
        for name in ("num_computed_tokens", "num_generation_tokens")
    }
    # Of a step of one engine, and the tokens of all.
    return {**longest, **{f"all_{name}": total for name, total in totals.items()}}


def _with_rates(figures: dict[str, float], is_decode: bool) -> dict[str, float]:
    """Add tokens per second, what a step takes, and how much of it goes into exchanges."""
    name = "num_generation_tokens" if is_decode else "num_computed_tokens"
    steps, seconds = figures["num_steps"], figures["step_seconds"]
    added = {
        RATE: figures.get(f"all_{name}", figures[name]) / figures["seconds"],
        STEP_MS: 1e3 * seconds / steps,
        OVERHEAD_MS: 1e3 * (seconds - figures["forward_seconds"]) / steps,
    }
    if "rank0_seconds" in figures:
        taken = figures["rank0_seconds"]
        added[EXCHANGE_MS] = 1e3 * taken / steps
        added[SHARE] = taken / seconds
        added[WAITING] = figures["rank0_waited"] / taken if taken else 0.0
    return {**figures, **added}


@dataclass(frozen=True, slots=True)
class Counted:
    """What a rank handed over in a step, beside the formula.

    Attributes
    ----------
    label : str
    rank : int
    measured, formula : list of Traffic
        Of each run, all of its steps together; operations of runs whose steps are not alike are
        not counted by the formula: they are those measured.
    steps : list of int
    """

    label: str
    rank: int
    measured: list[Traffic]
    formula: list[Traffic]
    steps: list[int]

    @property
    def agrees(self) -> bool:
        """Whether they are equal, in every run."""
        return self.measured == self.formula


def count_traffic(done: Done, shape: Shape) -> list[Counted]:
    """Return what each rank of each side handed over, and what it was to hand over."""
    counted = []
    for division, measurement in done.measurements:
        for rank, place in enumerate(division.places):
            runs = measurement.runs
            if f"rank{rank}_{COUNTS[0]}" not in runs:
                continue
            measured, formula = [], []
            steps = [int(n) for n in runs["num_steps"]]
            for i, count in enumerate(steps):
                operations = int(runs[f"rank{rank}_operations"][i])
                measured.append(Traffic(operations, int(runs[f"rank{rank}_num_bytes"][i])))
                tokens = int(runs["num_computed_tokens"][i])
                rows = int(runs["num_generation_tokens"][i])
                expected = rank_traffic(shape, place, tokens, rows)
                if tokens == count * done.step_tokens(division):  # each of them is like the others
                    one = rank_traffic(shape, place, tokens // count, rows // count)
                    operations = count * one.operations
                formula.append(replace(expected, operations=operations))
            counted.append(Counted(division.label, rank, measured, formula, steps))
    return counted
