"""What `quire bench parallel` measured, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quire.bench.contest import Measurement
from quire.bench.parallel_model import HALF, Load, StepTime, step_time
from quire.bench.parallel_runs import (
    EXCHANGE_MS,
    OVERHEAD_MS,
    RATE,
    SHARE,
    STEP_MS,
    WAITING,
    Counted,
    Division,
    Done,
    Hardware,
)
from quire.bench.report import spread, table
from quire.bench.traffic import Shape


def speed_table(done: Done) -> str:
    """Return a workload's table: a row for each side."""
    rows = [
        ["side", "tok/s: median (range)", "ms per step", "exchanging, % of it",
         "waiting, % of that"]
    ]  # fmt: skip
    for _, measured in done.measurements:
        rows.append(
            [
                measured.label,
                spread(measured, RATE, 1),
                spread(measured, STEP_MS, 2),
                spread(measured, SHARE, 1, 100.0),
                spread(measured, WAITING, 0, 100.0),
            ]
        )
    return table(rows)


def traffic_table(counted: Mapping[str, Sequence[Counted]]) -> str:
    """Return what ranks handed over, beside the formula; of the last run."""
    rows = [["workload", "side", "rank", "exchanges", "formula", "bytes", "formula", "in all runs"]]
    for name, ranks in counted.items():
        for each in ranks:
            steps = each.steps[-1]
            measured, formula = each.measured[-1], each.formula[-1]
            rows.append(
                [
                    name,
                    each.label,
                    str(each.rank),
                    f"{measured.operations / steps:,g}",
                    f"{formula.operations / steps:,g}",
                    f"{measured.num_bytes / steps:,.0f}",
                    f"{formula.num_bytes / steps:,.0f}",
                    "equal" if each.agrees else "DIFFERENT",
                ]
            )
    return table(rows)


def differences(counted: Mapping[str, Sequence[Counted]]) -> Iterator[str]:
    """Say where a rank handed over something else than the formula has."""
    for name, ranks in counted.items():
        for each in ranks:
            for run, (measured, formula) in enumerate(
                zip(each.measured, each.formula, strict=True)
            ):
                if measured != formula:
                    yield (
                        f"{name}, {each.label}, rank {each.rank}, run {run + 1}: {measured}, and "
                        f"by the formula {formula}"
                    )


def hardware_table(hardware: Hardware) -> str:
    """Return what the machine could do."""
    measured = hardware.measured
    threads = int(measured.runs["threads"][0])
    told = [
        ("read_all", f"read by {threads} threads, GB/s", 1e-9, 1),
        ("read_half", f"by {max(1, threads // 2)}, GB/s", 1e-9, 1),
        ("flops_all", f"multiplied by {threads}, GFLOP/s", 1e-9, 0),
        ("flops_half", f"by {max(1, threads // 2)}, GFLOP/s", 1e-9, 0),
        ("latency", "a sum of next to nothing over two processes, us", 1e6, 1),
        ("link", "a large one: of a rank's part, GB/s", 1e-9, 2),
    ]
    rows = [["what", "median (range)"]]
    rows += [
        [words, spread(measured, name, digits, scale)]
        for name, words, scale, digits in told
        if name in measured.runs
    ]
    return table(rows)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step by the model on paper, and as it was.

    Attributes
    ----------
    workload, label : str
    time : StepTime
    measured : Measurement
    """

    workload: str
    label: str
    time: StepTime
    measured: Measurement


def predictions(
    done: Sequence[Done], hardware: Hardware, shape: Shape, item_bytes: float = HALF
) -> list[Prediction]:
    """Return the steps of all sides of all workloads by the model on paper.

    What the engine takes is that of the first side.
    """
    made = []
    for each in done:
        overhead = 1e-3 * each.measurements[0][1].median(OVERHEAD_MS)
        for division, measured in each.measurements:
            time = step_time(
                shape,
                _load(each, division, item_bytes),
                hardware.of_rank(division, overhead),
                division.tensor_size,
                division.num_stages,
            )
            made.append(Prediction(each.workload.name, division.label, time, measured))
    return made


def _load(done: Done, division: Division, item_bytes: float) -> Load:
    count, length = done.prompts_of(division), len(done.workload.prompts[0])
    context = length + done.workload.output_lens[0] / 2 if done.is_decode else length / 2
    return Load(
        num_tokens=done.step_tokens(division),
        num_rows=count,
        num_seqs=count,
        context=context,
        weight_bytes=item_bytes,
        head_bytes=item_bytes,
        cache_bytes=item_bytes,
    )


def model_table(predicted: Sequence[Prediction]) -> str:
    """Return steps by the model on paper beside those measured."""
    rows = [
        ["workload", "side", "layers, ms", "exchanges, ms", "engine, ms", "step, ms",
         "measured, ms", "of it exchanging, ms", "measured / model"]
    ]  # fmt: skip
    for each in predicted:
        time, measured = each.time, each.measured
        ratio = [ms / (1e3 * time.seconds) for ms in measured.runs[STEP_MS]]
        rows.append(
            [
                each.workload,
                each.label,
                f"{1e3 * time.layers:.2f}",
                f"{1e3 * time.exchange:.2f}",
                f"{1e3 * time.overhead:.2f}",
                f"{1e3 * time.seconds:.2f}",
                spread(measured, STEP_MS, 2),
                spread(measured, EXCHANGE_MS, 2),
                spread(Measurement("", {"ratio": ratio}), "ratio"),
            ]
        )
    return table(rows)
