"""Runs of one model in many formats: how fast it decodes, and what loading it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from quire.bench.contest import Contestant, Measurement
from quire.bench.formats import Format
from quire.bench.limit import measure_bandwidth
from quire.bench.load_memory import measure_load
from quire.bench.record import Entry, add_rates
from quire.bench.workload import Workload

RATE = "decode_tokens_per_second"
VS_BASE = "vs_base"
OF_LIMIT = "of_limit"
STEP_BYTES = "step_bytes"


@dataclass(frozen=True, slots=True)
class Decoding:
    """What came of a workload.

    Attributes
    ----------
    workload : Workload
    measurements : list of Measurement
        Of each side, the first being the base: ``decode_tokens_per_second``, ``vs_base``, and of a
        workload of one prompt ``of_limit``.
    bandwidth : list of float
        Bytes per second that memory was read with, in each turn.
    """

    workload: Workload
    measurements: list[Measurement]
    bandwidth: list[float]


def measure_decoding(
    entries: Sequence[Entry],
    workloads: Sequence[Workload],
    *,
    known_bytes: Mapping[str, int],
    repeats: int,
    num_threads: int,
    say: Callable[[str], None],
) -> tuple[list[Decoding], list[dict[str, str]]]:
    """Let all sides run all workloads in turns, and read memory once in each turn.

    Parameters
    ----------
    entries : sequence of Entry
    workloads : sequence of Workload
    known_bytes : mapping of str to int
        The bytes of weights that a step reads, of the sides that do not tell.
    repeats : int
        Counted turns; before them each side runs the largest workload's beginning.
    num_threads : int
        That read memory.
    say : callable

    Returns
    -------
    list of Decoding
    list of dict
        Versions of each side.
    """
    with ExitStack() as stack:
        contestants = []
        for e in entries:
            contestant = Contestant(e.label, e.side, e.model, e.options, e.python, e.environment)
            contestants.append(stack.enter_context(contestant))
            say(f"  {e.label}: loaded")
        largest = max(workloads, key=lambda work: len(work.prompts))
        warmup = replace(largest, output_lens=[min(n, 4) for n in largest.output_lens])
        for contestant in contestants:
            contestant.run(warmup)
        done = [Decoding(w, [Measurement(e.label) for e in entries], []) for w in workloads]
        for repeat in range(repeats):
            for each in done:
                each.bandwidth.append(measure_bandwidth(num_threads))
                for contestant, measurement in zip(contestants, each.measurements, strict=True):
                    measurement.add(contestant.run(each.workload))
                say(f"  turn {repeat + 1} of {repeats}: {each.workload.name}")
        versions = [contestant.versions for contestant in contestants]
    for each in done:
        add_ratios(each, known_bytes)
    return done, versions


def add_ratios(done: Decoding, known_bytes: Mapping[str, int]) -> None:
    """Derive rates and what they are beside the base's and memory's, each of the same turn."""
    workload = done.workload
    later = workload.num_output_tokens - len(workload.prompts)
    for measurement in done.measurements:
        runs = measurement.runs
        add_rates(measurement, workload.num_output_tokens, later)
        if measurement.label in known_bytes:
            runs[STEP_BYTES] = [float(known_bytes[measurement.label])] * len(runs["seconds"])
        base = done.measurements[0].runs[RATE]
        runs[VS_BASE] = [rate / other for rate, other in zip(runs[RATE], base, strict=True)]
        if len(workload.prompts) == 1 and STEP_BYTES in runs:
            steps = zip(runs[RATE], runs[STEP_BYTES], done.bandwidth, strict=True)
            runs[OF_LIMIT] = [rate * count / bandwidth for rate, count, bandwidth in steps]


def measure_loading(
    formats: Sequence[Format], dtype: str, *, repeats: int, say: Callable[[str], None]
) -> list[Measurement]:
    """Load each format in processes of their own, in turns.

    Returns
    -------
    list of Measurement
        See `quire.bench.load_memory.measure_load`.
    """
    done = [Measurement(each.name) for each in formats]
    for _ in range(repeats):
        for each, measurement in zip(formats, done, strict=True):
            figures = measure_load(str(each.folder), {"dtype": dtype, **each.options})
            measurement.add(figures)
            say(f"  {each.name}: loaded in {figures['load_seconds']:.2f} s")
    return done
