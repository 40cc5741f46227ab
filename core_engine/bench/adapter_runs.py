"""Runs with adapters: what they cost a batch, to be swapped in, and to be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench.contest import BenchError, Measurement
from quire.bench.random_adapters import AdapterShape
from quire.bench.record import add_rates
from quire.bench.workload import Workload, uniform

if TYPE_CHECKING:
    from quire import LLM, LoRARequest

VS_BASE = "vs_base"
_SETTLED_SECONDS = 2.5
"""A file that was read sooner after it was written is read again when it is next asked for."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A workload, and whose adapters its prompts ask for.

    Attributes
    ----------
    label : str
    workload : Workload
    adapters : sequence of LoRARequest
        Its prompts take them in turns; none: the model alone.
    """

    label: str
    workload: Workload
    adapters: Sequence[LoRARequest]

    def lora_requests(self) -> list[LoRARequest] | None:
        """One for each prompt."""
        if not self.adapters:
            return None
        count = len(self.adapters)
        return [self.adapters[i % count] for i in range(len(self.workload.prompts))]


def settle() -> None:
    """Wait until files that were just written are known by their time."""
    time.sleep(_SETTLED_SECONDS)


def run(llm: LLM, mode: Mode) -> dict[str, float]:
    """Generate once; the prefix cache starts empty."""
    from quire import SamplingParams

    llm.reset_prefix_cache()
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in mode.workload.output_lens
    ]
    prompts: list[Any] = list(mode.workload.prompts)
    before = llm.get_metrics()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=mode.lora_requests())
    seconds = time.perf_counter() - started
    after = llm.get_metrics()
    made = [len(output.outputs[0].token_ids) for output in outputs]
    if made != mode.workload.output_lens:
        raise BenchError(f"{mode.label}: generated {made}, not {mode.workload.output_lens}")
    firsts = [
        output.metrics.first_token_time - output.metrics.arrival_time
        for output in outputs
        if output.metrics is not None and output.metrics.first_token_time is not None
    ]
    steps, model = (after[name] - before[name] for name in ("step_seconds", "forward_seconds"))
    return {
        "seconds": seconds,
        "first_token_seconds": sum(firsts) / len(firsts),
        "engine_seconds": steps - model,
    }


def adapter_counts(most: int, workload: Workload) -> list[int]:
    """Return how many adapters a workload is run with: none, one, and all if it has the prompts."""
    return [n for n in sorted({0, 1, most}) if n <= len(workload.prompts)]


def measure_throughput(
    llm: LLM,
    adapters: Sequence[LoRARequest],
    workloads: Sequence[Workload],
    *,
    repeats: int,
    say: Callable[[str], None],
) -> list[list[Measurement]]:
    """Run workloads on one engine without adapters, with one, and with all mixed, in turns.

    Parameters
    ----------
    llm : LLM
        With a slot for each adapter.
    adapters : sequence of LoRARequest
    workloads : sequence of Workload
    repeats : int
        Counted runs of each; one is not counted.
    say : callable

    Returns
    -------
    list of list of Measurement
        Of each workload: the model alone, then each number of adapters up to its prompts'. What
        came out beside the run of the model alone in the same turn is ``vs_base``: of the tokens
        after the first, per second.
    """
    modes = [
        [
            Mode(f"{n} adapter{'s' if n > 1 else ''}" if n else "base", workload, adapters[:n])
            for n in adapter_counts(len(adapters), workload)
        ]
        for workload in workloads
    ]
    done = [[Measurement(mode.label) for mode in row] for row in modes]
    for repeat in range(repeats + 1):
        for row, measurements in zip(modes, done, strict=True):
            for mode, measurement in zip(row, measurements, strict=True):
                figures = run(llm, mode)
                if repeat:
                    measurement.add(figures)
                    say(f"  {mode.workload.name}, {mode.label}: {figures['seconds']:.2f} s")
    for row, measurements in zip(modes, done, strict=True):
        for mode, measurement in zip(row, measurements, strict=True):
            num_tokens = mode.workload.num_output_tokens
            add_rates(measurement, num_tokens, num_tokens - len(mode.workload.prompts))
            rates, alone = (
                each.runs["decode_tokens_per_second"] for each in (measurement, measurements[0])
            )
            measurement.runs[VS_BASE] = [a / b for a, b in zip(rates, alone, strict=True)]
    return done


def measure_swap(
    llm: LLM,
    adapters: Sequence[LoRARequest],
    *,
    vocab_size: int,
    input_len: int,
    repeats: int,
    say: Callable[[str], None],
) -> Measurement:
    """Time a first token whose adapter has the slot, and one whose adapter is only in memory.

    Parameters
    ----------
    llm : LLM
        With one slot, and both adapters in memory.
    adapters : sequence of LoRARequest
        Two.
    vocab_size, input_len : int
        Of the prompt.
    repeats : int
        Counted pairs.
    say : callable

    Returns
    -------
    Measurement
        ``resident_seconds``, ``swapped_seconds``, and in ``swap_seconds`` what the second took
        longer than the first, in each pair; ``placing_seconds`` is how much of that was outside
        of the model's computation, where an adapter is put into its slot.
    """
    measurement = Measurement("swap")
    workload = uniform(1, input_len, 1, vocab_size=vocab_size)
    for adapter in adapters:  # not counted
        run(llm, Mode("warm-up", workload, [adapter]))
    for repeat in range(repeats):
        resident, other = (adapters[(repeat + i + 1) % 2] for i in range(2))
        stays = run(llm, Mode("resident", workload, [resident]))
        comes = run(llm, Mode("swapped", workload, [other]))
        longer = {name: comes[name] - stays[name] for name in stays}
        measurement.add(
            {
                "resident_seconds": stays["first_token_seconds"],
                "swapped_seconds": comes["first_token_seconds"],
                "swap_seconds": longer["first_token_seconds"],
                "placing_seconds": longer["engine_seconds"],
            }
        )
    say(f"  {repeats} swaps")
    return measurement


def measure_load(
    llm: LLM, shape: AdapterShape, folder: Path, *, repeats: int, say: Callable[[str], None]
) -> Measurement:
    """Time how long adapters take to be read for the first time, and again, unchanged.

    Parameters
    ----------
    llm : LLM
    shape : AdapterShape
    folder : Path
        Where new ones are written, just before: the operating system has them in memory.
    repeats : int
        Counted loads of each kind; one is not counted.
    say : callable

    Returns
    -------
    Measurement
        ``first_seconds`` and ``again_seconds``.
    """
    measurement = Measurement("load")
    name = "new"
    for repeat in range(repeats + 1):
        path = shape.write(folder / f"{name}-{repeat}", seed=1_000_000 + repeat)
        seconds = _load_seconds(llm, path, name)
        if repeat:
            measurement.add({"first_seconds": seconds})
            say(f"  first load: {1e3 * seconds:.1f} ms")
        if repeat < repeats:
            llm.unload_lora(name)
    settle()
    for repeat in range(repeats + 1):
        seconds = _load_seconds(llm, path, name)
        if repeat:
            measurement.add({"again_seconds": seconds})
    llm.unload_lora(name)
    return measurement


def _load_seconds(llm: LLM, path: Path, name: str) -> float:
    started = time.perf_counter()
    llm.load_lora(path, name=name)
    return time.perf_counter() - started
