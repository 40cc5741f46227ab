"""``quire bench``: its subcommands; the short ones are here."""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench import report
from quire.bench.chart import Bar, draw
from quire.bench.contest import BenchError, Measurement
from quire.bench.dataset import read_pairs, sample_pairs
from quire.bench.gpu.command import gpu
from quire.bench.lora import lora
from quire.bench.options import (
    Chart,
    Checkpoint,
    Dtype,
    GgufType,
    Json,
    Model,
    PeerEnv,
    PeerPython,
    Peers,
    Random,
    Repeats,
    Seed,
    Vs,
    find_checkpoint,
)
from quire.bench.parallel import parallel
from quire.bench.products import measure_products
from quire.bench.quality import quality
from quire.bench.quantization import quantization
from quire.bench.record import Entry, Record, record
from quire.bench.serve import serve
from quire.bench.startup import measure_startup
from quire.bench.structured import structured
from quire.bench.workload import Workload, mixed, shared_prefix, uniform
from quire.models.hf_config import max_length
from quire.models.hub import resolve

app = typer.Typer(
    help="Measure quire, beside its peers and on the same tokens.", no_args_is_help=True
)

_DATASET_LEN = 1024  # most tokens of a dataset's prompts, and of its answers
_MIN_LEN = 16  # least of mixed ones


def _quire(checkpoint: Checkpoint, label: str = "quire", **options: Any) -> Entry:
    return Entry(label, "quire", str(checkpoint.folder), options, sys.executable)


def _measure(
    checkpoint: Checkpoint,
    workload: Workload,
    entries: list[Entry],
    repeats: int,
    json_file: Path | None,
) -> Record:
    """Measure, and write the JSON file."""
    pairs = zip(workload.prompts, workload.output_lens, strict=True)
    longest, most = max(len(prompt) + n for prompt, n in pairs), max_length(checkpoint.config)
    if longest > most:
        raise typer.BadParameter(
            f"a prompt and its output have up to {longest} tokens together, and "
            f"{checkpoint.name} takes {most}: lower --input-len or --output-len"
        )
    done = record(
        checkpoint.name,
        checkpoint.folder,
        checkpoint.vocab_size,
        workload,
        entries,
        repeats,
        typer.echo,
    )
    if json_file is not None:
        done.write(json_file)
    return done


def _show(done: Record, table: str, rate: str, limit: float, chart: Path | None) -> None:
    """Print the tables, and draw the chart.

    Parameters
    ----------
    done : Record
    table : str
    rate : str
        The speed that is drawn: ``output`` or ``decode`` tokens per second.
    limit : float
        The most that it can be.
    chart : Path or None
    """
    typer.echo(table)
    typer.echo(
        f"limit: {done.limit.bytes_per_second / 1e9:.1f} GB/s read, "
        f"{done.limit.flops / 1e9:.0f} GFLOP/s multiplied\n"
    )
    typer.echo(done.sides_table())
    if chart is not None:
        bars = []
        for entry, measurement in zip(done.entries, done.measurements, strict=True):
            if rates := measurement.runs.get(f"{rate}_tokens_per_second"):
                bars.append(Bar(entry.label, entry.side, rates))
        title = f"{done.model}\n{done.workload.name}"
        draw(chart, title, f"{rate} tokens/s", bars, limit)


def _show_throughput(done: Record, chart: Path | None) -> None:
    limit = done.workload.num_output_tokens / done.limit_seconds
    table = report.throughput_table(done.measurements, done.limit_seconds, limit)
    _show(done, table, "output", limit, chart)


def _dataset(
    file: Path,
    checkpoint: Checkpoint,
    tokenizer: str | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
    seed: int,
) -> Workload:
    """Draw prompts from a file; what is wrong with it is an error of usage."""
    from quire.tokenizer.loader import load_tokenizer

    folder = checkpoint.folder if tokenizer is None else resolve(tokenizer, field="tokenizer")
    tokens = load_tokenizer(folder, model_config=checkpoint.config)
    try:
        return sample_pairs(
            read_pairs(file),
            tokens.encode,
            partial(tokens.encode, add_special_tokens=False),
            num_prompts=num_prompts,
            input_len=input_len,
            output_len=output_len,
            total_len=min(input_len + output_len, max_length(checkpoint.config)),
            seed=seed,
            name=file.name,
        )
    except ValueError as error:
        raise typer.BadParameter(f"--dataset: {error}") from error


@app.command()
def throughput(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    vs: Vs = "transformers",
    workload: Annotated[
        str | None,
        typer.Option(
            help="uniform or mixed: the lengths of random prompts.", show_default="uniform"
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="ShareGPT-format JSON: first questions, with their answers' length.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="For --dataset.", show_default="the model's")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 32,
    input_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prompt; most, if mixed or of a dataset.",
            show_default=f"128; {_DATASET_LEN} for a dataset",
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens generated; most, if mixed or of a dataset.",
            show_default=f"128; {_DATASET_LEN} for a dataset",
        ),
    ] = None,
    seed: Seed = 0,
    peer_python: PeerPython = None,
    peer_env: PeerEnv = None,
    gguf_type: GgufType = None,
    repeats: Repeats = 3,
    json_file: Json = None,
    chart: Chart = None,
) -> None:
    """Output tokens per second over many prompts given at once."""
    if workload is not None and dataset is not None:
        raise typer.BadParameter(f"--workload {workload!r} and --dataset {dataset}: give one")
    if workload not in (None, "uniform", "mixed"):
        raise typer.BadParameter(f"--workload {workload!r}: uniform or mixed")
    if tokenizer is not None and dataset is None:
        raise typer.BadParameter(f"--tokenizer {tokenizer!r} is for --dataset")
    if dataset is not None and model is None and tokenizer is None:
        raise typer.BadParameter(
            f"--dataset {dataset}: a random checkpoint has no tokenizer; "
            "give --model or --tokenizer"
        )
    peers = Peers.parse(vs, peer_python, peer_env, gguf_type, dtype)
    checkpoint = find_checkpoint(model, random, dtype)
    default = 128 if dataset is None else _DATASET_LEN
    ins, outs = input_len or default, output_len or default
    size = checkpoint.vocab_size
    if dataset is not None:
        work = _dataset(dataset, checkpoint, tokenizer, num_prompts, ins, outs, seed)
    elif workload == "mixed":
        lens = (min(_MIN_LEN, ins), ins), (min(_MIN_LEN, outs), outs)
        work = mixed(num_prompts, *lens, vocab_size=size, seed=seed)
    else:
        work = uniform(num_prompts, ins, outs, vocab_size=size, seed=seed)
    entries = [_quire(checkpoint, dtype=dtype), *peers.entries(checkpoint, dtype)]
    _show_throughput(_measure(checkpoint, work, entries, repeats, json_file), chart)


@app.command()
def prefix(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    vs: Vs = "none",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    prefix_len: Annotated[int, typer.Option(min=1, help="Tokens that all prompts share.")] = 1024,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt's own, after.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated.")] = 32,
    seed: Seed = 0,
    peer_python: PeerPython = None,
    peer_env: PeerEnv = None,
    gguf_type: GgufType = None,
    repeats: Repeats = 3,
    json_file: Json = None,
    chart: Chart = None,
) -> None:
    """What the prefix cache is worth where prompts begin alike: quire with it and without."""
    peers = Peers.parse(vs, peer_python, peer_env, gguf_type, dtype)
    checkpoint = find_checkpoint(model, random, dtype)
    work = shared_prefix(
        num_prompts, prefix_len, input_len, output_len, vocab_size=checkpoint.vocab_size, seed=seed
    )
    entries = [
        _quire(checkpoint, dtype=dtype, enable_prefix_caching=True),
        *peers.entries(checkpoint, dtype, {"enable_prefix_caching": True}),
        _quire(checkpoint, "quire, no prefix cache", dtype=dtype, enable_prefix_caching=False),
    ]
    _show_throughput(_measure(checkpoint, work, entries, repeats, json_file), chart)


@app.command()
def latency(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    vs: Vs = "none",
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 128,
    detokenize: Annotated[
        bool,
        typer.Option("--detokenize", help="quire with the outputs' text; needs a tokenizer."),
    ] = False,
    seed: Seed = 0,
    peer_python: PeerPython = None,
    peer_env: PeerEnv = None,
    gguf_type: GgufType = None,
    repeats: Repeats = 3,
    json_file: Json = None,
    chart: Chart = None,
) -> None:
    """Time to the first token, tokens per second after it, and what a step costs."""
    peers = Peers.parse(vs, peer_python, peer_env, gguf_type, dtype)
    checkpoint = find_checkpoint(model, random, dtype)
    work = uniform(batch, input_len, output_len, vocab_size=checkpoint.vocab_size, seed=seed)
    entries = [
        _quire(checkpoint, dtype=dtype, detokenize=detokenize),
        *peers.entries(checkpoint, dtype, {"disable_log_stats": False}),
    ]
    done = _measure(checkpoint, work, entries, repeats, json_file)
    table = report.latency_table(
        done.measurements,
        done.limit_seconds,
        done.limit_first_token_seconds,
        done.limit_decode_rate,
    )
    _show(done, table, "decode", done.limit_decode_rate, chart)


@app.command()
def startup(
    model: Annotated[str, typer.Option(help="The model to start.")] = "quire/demo",
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """From nothing to the first token, in fresh processes."""
    measured = Measurement(model)
    for _ in range(repeats):
        try:
            measured.add(measure_startup(model))
        except BenchError as error:
            raise typer.BadParameter(str(error)) from error
    rows = [["phase", "seconds: median (range)"]]
    rows += [
        [name.replace("_", " "), report.spread(measured, name, 3)]
        for name in measured.runs
        if name != "peak_bytes"
    ]
    rows.append(["peak memory, GB", report.spread(measured, "peak_bytes", 2, 1e-9)])
    typer.echo(report.table(rows))
    if json_file is not None:
        document = {"model": model, "machine": report.machine(), "runs": measured.runs}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@app.command()
def kernels(
    in_features: Annotated[int, typer.Option(min=2, help="Inputs of the product.")] = 896,
    out_features: Annotated[int, typer.Option(min=1, help="Its outputs.")] = 4864,
    dtype: Dtype = "bfloat16",
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,4,16,32,64,128,512",
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """The native matrix product beside torch's, over weights that no cache holds."""
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype!r}: the products are of float32 or bfloat16")
    numbers = [each.strip() for each in rows.split(",")]
    if not all(each.isdecimal() and int(each) > 0 for each in numbers):
        raise typer.BadParameter(f"--rows {rows!r}: numbers from 1 on, with commas between")
    figures = measure_products(
        in_features, out_features, dtype, [int(each) for each in numbers], repeats
    )
    sides = list(figures)
    table = [["rows", *(f"{side}, GB/s of weights (GFLOP/s)" for side in sides)]]
    weight_bytes = in_features * out_features * (4 if dtype == "float32" else 2)
    for count in figures[sides[0]]:
        flops = 2 * count * in_features * out_features
        cells = []
        for side in sides:
            seconds = statistics.median(figures[side][count])
            cells.append(f"{weight_bytes / seconds / 1e9:.1f} ({flops / seconds / 1e9:.0f})")
        table.append([str(count), *cells])
    typer.echo(report.table(table))
    if json_file is not None:
        document = {"machine": report.machine(), "seconds": figures}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


app.command()(structured)
app.command()(serve)
app.command()(lora)
app.command()(quantization)
app.command()(quality)
app.command()(parallel)
app.command()(gpu)
