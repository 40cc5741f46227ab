"""``quire bench lora``: many adapters in one batch, swapping them, and reading them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.bench import report
from quire.bench.adapter_runs import (
    VS_BASE,
    adapter_counts,
    measure_load,
    measure_swap,
    measure_throughput,
    settle,
)
from quire.bench.contest import Measurement
from quire.bench.gguf import TYPES
from quire.bench.limit import ModelSize
from quire.bench.options import Checkpoint, Dtype, Json, Model, Random, Seed, find_checkpoint
from quire.bench.random_adapters import TARGETS, AdapterShape
from quire.bench.sides import quire_versions
from quire.bench.workload import Workload, uniform
from quire.errors import QuireError
from quire.models.hf_config import max_length

if TYPE_CHECKING:
    from quire import LLM, LoRARequest

PARTS = ("throughput", "swap", "load")
SWAPS = 4
"""Swaps per repeat: a single one is short."""


def lora(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    parts: Annotated[
        str, typer.Option(help="What to measure, some of them with commas.")
    ] = ",".join(PARTS),
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters mixed in a batch.")] = 8,
    targets: Annotated[
        str, typer.Option(help="Modules that the adapters change, with commas.")
    ] = ",".join(TARGETS),
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 32,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 64,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 5,
    json_file: Json = None,
) -> None:
    """What adapters cost: in a batch beside none, until one is in its slot, until one is read."""
    names = [name.strip() for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise typer.BadParameter(f"--parts {name!r}: some of {', '.join(PARTS)}")
    if dtype not in TYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: one of {', '.join(TYPES)}")
    if adapters > batch:
        raise typer.BadParameter(
            f"--adapters {adapters}: at most one per prompt of --batch {batch}"
        )
    checkpoint = find_checkpoint(model, random, dtype)
    total, most = input_len + output_len, max_length(checkpoint.config)
    if total > most:
        raise typer.BadParameter(
            f"a prompt and its output have {total} tokens together, and {checkpoint.name} takes "
            f"{most}: lower --output-len"
        )
    modules = [target.strip() for target in targets.split(",") if target.strip()]
    try:
        shape = AdapterShape.of(checkpoint.folder, modules, rank, dtype)
    except ValueError as error:
        raise typer.BadParameter(f"--targets {error}") from error
    typer.echo(f"{checkpoint.name}; {json.dumps(report.machine())}")
    typer.echo(f"adapters: rank {rank}, {', '.join(modules)}; {shape.num_bytes / 1e6:.1f} MB each")
    document: dict[str, Any] = {
        "model": checkpoint.name,
        "machine": report.machine(),
        "versions": quire_versions(),
        "rank": rank,
        "targets": modules,
        "adapter_bytes": shape.num_bytes,
    }
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as scratch:
        bench = _Bench(checkpoint, shape, Path(scratch), dtype, repeats)
        try:
            if "throughput" in names:
                workloads = [
                    uniform(n, input_len, output_len, vocab_size=checkpoint.vocab_size, seed=seed)
                    for n in sorted({batch, 1}, reverse=True)
                ]
                document["throughput"] = bench.throughput(adapters, workloads)
            if "swap" in names:
                document["swap"] = bench.swap(input_len)
            if "load" in names:
                document["load"] = bench.load()
        except QuireError as error:
            raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def ceilings(size: ModelSize, shape: AdapterShape, counts: Sequence[int]) -> list[float]:
    """Return the speed beside that of the model alone, at most, by how many adapters are read."""
    return [size.step_bytes / (size.step_bytes + n * shape.num_bytes) for n in counts]


class _Bench:
    """The parts; each prints its table and returns its figures."""

    def __init__(
        self, checkpoint: Checkpoint, shape: AdapterShape, scratch: Path, dtype: str, repeats: int
    ) -> None:
        self._checkpoint = checkpoint
        self._shape = shape
        self._scratch = scratch
        self._dtype = dtype
        self._repeats = repeats

    def throughput(self, count: int, workloads: list[Workload]) -> dict[str, Any]:
        size = ModelSize.of(self._checkpoint.folder, self._checkpoint.vocab_size)
        with self._open(max_loras=count) as llm:
            adapters = self._load(llm, count)
            done = measure_throughput(
                llm, adapters, workloads, repeats=self._repeats, say=typer.echo
            )
        rows = [["prompts", *_HEADINGS]]
        figures: dict[str, Any] = {"step_bytes": size.step_bytes}
        for workload, measurements in zip(workloads, done, strict=True):
            figures[workload.name] = {}
            counts = adapter_counts(count, workload)
            limits = ceilings(size, self._shape, counts)
            for measurement, ceiling in zip(measurements, limits, strict=True):
                rows.append([str(len(workload.prompts)), *_cells(measurement, ceiling)])
                figures[workload.name][measurement.label] = {
                    "ceiling": ceiling,
                    "runs": measurement.runs,
                }
        typer.echo(f"\nthroughput: {', '.join(each.name for each in workloads)}")
        typer.echo(report.table(rows) + "\n")
        return figures

    def swap(self, input_len: int) -> dict[str, Any]:
        with self._open(max_loras=1, max_cpu_loras=2) as llm:
            measured = measure_swap(
                llm,
                self._load(llm, 2),
                vocab_size=self._checkpoint.vocab_size,
                input_len=input_len,
                repeats=SWAPS * self._repeats,
                say=typer.echo,
            )
        rows = [["first token, ms", "median (range)"]]
        rows += _milliseconds(
            measured,
            {
                "resident_seconds": "adapter in its slot",
                "swapped_seconds": "adapter in memory alone",
                "swap_seconds": "what swapping adds",
                "placing_seconds": "of that, in the engine",
            },
        )
        typer.echo("\nswap: one slot, two adapters")
        typer.echo(report.table(rows) + "\n")
        return measured.runs

    def load(self) -> dict[str, Any]:
        with self._open(max_loras=1) as llm:
            folder = self._scratch / "new"
            measured = measure_load(llm, self._shape, folder, repeats=self._repeats, say=typer.echo)
        rows = [["load_lora, ms", "median (range)"]]
        rows += _milliseconds(
            measured, {"first_seconds": "a new folder", "again_seconds": "again, unchanged"}
        )
        typer.echo("\nload: files that the operating system has in memory")
        typer.echo(report.table(rows) + "\n")
        return measured.runs

    def _open(self, max_loras: int, max_cpu_loras: int | None = None) -> LLM:
        from quire import LLM

        return LLM(
            self._checkpoint.folder,
            dtype=self._dtype,
            skip_tokenizer_init=True,
            enable_lora=True,
            max_lora_rank=self._shape.rank,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
        )

    def _load(self, llm: LLM, count: int) -> list[LoRARequest]:
        folders = [self._shape.write(self._scratch / f"adapter-{i}", seed=i) for i in range(count)]
        settle()
        return [llm.load_lora(folder) for folder in folders]


_HEADINGS = (
    "adapters",
    "seconds: median (range)",
    "output tok/s",
    "decode tok/s",
    "vs base",
    "of bytes' ceiling",
)


def _cells(measurement: Measurement, ceiling: float) -> list[str]:
    return [
        measurement.label,
        report.spread(measurement, "seconds"),
        f"{measurement.median('output_tokens_per_second'):.1f}",
        f"{measurement.median('decode_tokens_per_second'):.1f}",
        report.spread(measurement, VS_BASE, 3),
        f"{measurement.median(VS_BASE) / ceiling:.0%} of {ceiling:.3f}",
    ]


def _milliseconds(measurement: Measurement, names: dict[str, str]) -> list[list[str]]:
    return [[told, report.spread(measurement, name, 1, 1e3)] for name, told in names.items()]
