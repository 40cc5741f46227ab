"""``quire bench structured``: masks, compilation, throughput, and what forced tokens save."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench import report
from quire.bench.cases import CASES, draw_schemas
from quire.bench.constrained import (
    measure_canonical,
    measure_steps,
    measure_throughput,
)
from quire.bench.contest import Measurement
from quire.bench.gguf import TYPES
from quire.bench.masks import measure_masks
from quire.bench.options import (
    Checkpoint,
    Dtype,
    Json,
    Model,
    Seed,
    find_checkpoint,
)
from quire.bench.sides import quire_versions
from quire.bench.structured_tables import cases_table, masks_table, rates_table, steps_table
from quire.bench.tokens import make_tokenizer
from quire.bench.workload import Workload, uniform
from quire.errors import QuireError
from quire.models.hf_config import max_length

PARTS = ("masks", "throughput", "steps", "canonical")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    repeats : int
        Counted runs.
    mask_batch, mask_steps : int
        Rows, and tokens of each.
    num_schemas : int
        Compiled beside the cases.
    batch, input_len, output_len : int
        Of the throughput.
    num_records : int
        Of the steps, of each kind.
    record_batches : tuple of int
        Prompts at once of the canonical mode.
    """

    repeats: int = 3
    mask_batch: int = 32
    mask_steps: int = 200
    num_schemas: int = 16
    batch: int = 16
    input_len: int = 32
    output_len: int = 64
    num_records: int = 8
    record_batches: tuple[int, ...] = (1, 16)


QUICK = Sizes(
    repeats=1,
    mask_batch=8,
    mask_steps=16,
    num_schemas=2,
    batch=4,
    input_len=8,
    output_len=16,
    num_records=2,
    record_batches=(1, 4),
)


def structured(
    model: Model = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="Dimensions of the random checkpoint, and size of its vocabulary.",
            show_default="qwen2.5-0.5b; llama-small with --quick",
        ),
    ] = None,
    dtype: Dtype = "bfloat16",
    parts: Annotated[
        str, typer.Option(help="What to measure, some of them with commas.")
    ] = ",".join(PARTS),
    batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once, of throughput.", show_default="16")
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens generated, of throughput.", show_default="64")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: whether it works, not how fast it is.")
    ] = False,
    seed: Seed = 0,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Counted runs.", show_default="3; 1 with --quick")
    ] = None,
    json_file: Json = None,
) -> None:
    """What structured outputs cost, by library and beside free generation, and what they save."""
    names = [name.strip() for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise typer.BadParameter(f"--parts {name!r}: some of {', '.join(PARTS)}")
    if dtype not in TYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: one of {', '.join(TYPES)}")
    given: dict[str, Any] = {"batch": batch, "output_len": output_len, "repeats": repeats}
    sizes = replace(
        QUICK if quick else Sizes(),
        **{name: value for name, value in given.items() if value is not None},
    )
    checkpoint = find_checkpoint(
        model, random or ("llama-small" if quick else "qwen2.5-0.5b"), dtype
    )
    total, most = sizes.input_len + sizes.output_len, max_length(checkpoint.config)
    if total > most:
        raise typer.BadParameter(
            f"a prompt and its output have {total} tokens together, and {checkpoint.name} takes "
            f"{most}: lower --output-len"
        )
    tokenizer = checkpoint.folder
    if model is None:
        tokenizer = make_tokenizer(checkpoint.vocab_size, checkpoint.config["eos_token_id"])
    bench = _Bench(checkpoint, tokenizer, dtype, sizes, seed)
    typer.echo(f"{checkpoint.name}; {json.dumps(report.machine())}")
    document: dict[str, Any] = {
        "model": checkpoint.name,
        "machine": report.machine(),
        "versions": quire_versions(),
    }
    measures = {
        "masks": bench.masks,
        "throughput": bench.throughput,
        "steps": bench.steps,
        "canonical": bench.canonical,
    }
    for name in PARTS:
        if name in names:
            try:
                document[name] = measures[name]()
            except QuireError as error:
                raise typer.BadParameter(f"{name}: {error}") from error
            typer.echo("")
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


class _Bench:
    """The parts; each prints its tables and returns its figures."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Path, dtype: str, sizes: Sizes, seed: int
    ) -> None:
        self._checkpoint = checkpoint
        self._sizes = sizes
        self._seed = seed
        self._tokenizer = tokenizer
        self._options = {
            "dtype": dtype,
            "tokenizer": str(tokenizer),
            "max_model_len": min(
                max(1024, sizes.input_len + sizes.output_len), max_length(checkpoint.config)
            ),
        }

    def masks(self) -> dict[str, Any]:
        from quire.structured.vocabulary import Vocabulary
        from quire.tokenizer.loader import load_tokenizer

        sizes = self._sizes
        tokenizer = load_tokenizer(self._tokenizer, model_config=self._checkpoint.config)
        libraries = measure_masks(
            Vocabulary(tokenizer, self._checkpoint.vocab_size),
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            CASES,
            draw_schemas(sizes.num_schemas, self._seed),
            batch=sizes.mask_batch,
            steps=sizes.mask_steps,
            repeats=sizes.repeats,
            seed=self._seed,
            say=typer.echo,
        )
        typer.echo(
            f"\nmasks: {self._checkpoint.vocab_size} tokens, {sizes.mask_batch} rows, "
            f"{sizes.mask_steps} tokens of each"
        )
        typer.echo(masks_table(libraries))
        typer.echo("")
        typer.echo(cases_table(libraries))
        return {library.name: library.document() for library in libraries}

    def throughput(self) -> dict[str, Any]:
        sizes = self._sizes
        workload = self._prompts(sizes.batch, sizes.output_len)
        done = measure_throughput(
            self._checkpoint.folder,
            self._options,
            workload,
            repeats=sizes.repeats,
            say=typer.echo,
        )
        typer.echo(f"\nthroughput: {workload.name}, forced tokens off")
        typer.echo(rates_table(done))
        return _runs(done)

    def steps(self) -> dict[str, Any]:
        done = measure_steps(
            "quire/demo",
            {"dtype": "float32"},
            num_records=self._sizes.num_records,
            say=typer.echo,
        )
        typer.echo("\nsteps: quire/demo, records of fixed keys one by one, equal outputs")
        typer.echo(steps_table(done))
        return {kind: _runs(sides) for kind, sides in done.items()}

    def canonical(self) -> dict[str, Any]:
        figures = {}
        for batch in self._sizes.record_batches:
            done = measure_canonical(
                self._checkpoint.folder,
                self._options,
                self._prompts(batch, 1).prompts,
                repeats=self._sizes.repeats,
                say=typer.echo,
            )
            typer.echo(f"\ncanonical: {batch} records of fixed keys at once")
            typer.echo(rates_table(done, characters=True))
            figures[str(batch)] = _runs(done)
        return figures

    def _prompts(self, batch: int, output_len: int) -> Workload:
        return uniform(
            batch,
            self._sizes.input_len,
            output_len,
            vocab_size=self._checkpoint.vocab_size,
            seed=self._seed,
        )


def _runs(measurements: list[Measurement]) -> dict[str, Any]:
    return {measurement.label: measurement.runs for measurement in measurements}
