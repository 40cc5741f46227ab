"""``quire bench``: throughput, latency, startup."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench import report
from quire.bench.checkpoint import DIMENSIONS, random_checkpoint
from quire.bench.contest import BenchError, Contestant, Measurement, alternate
from quire.bench.limit import ModelSize, measure_limit
from quire.bench.products import measure_products
from quire.bench.startup import measure_startup
from quire.bench.workload import Workload, mixed, shared_prefix, uniform
from quire.models.hub import resolve

app = typer.Typer(
    help="Measure quire, beside its peers and on the same tokens.", no_args_is_help=True
)


Model = Annotated[
    str | None, typer.Option(help="A checkpoint to measure with; else --random makes one.")
]
Random = Annotated[
    str, typer.Option(help=f"Dimensions of the random checkpoint: {', '.join(DIMENSIONS)}.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: bfloat16, float32 or float16.")]
Vs = Annotated[
    str, typer.Option(help="Peers to measure beside: transformers, vllm, both with a comma, none.")
]
PeerPython = Annotated[
    str | None,
    typer.Option(help="The interpreter of an environment that has vLLM; quire need not be there."),
]
PeerEnv = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An environment variable for vLLM's process."),
]
Repeats = Annotated[int, typer.Option(min=1, help="Counted runs per side.")]


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before hours are spent on its content."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path}: no file can be written there")
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_writable, help="Write all figures to this file."),
]


def _checkpoint(model: str | None, random: str, dtype: str) -> tuple[str, int]:
    """Return the model's folder or name, and the size of its vocabulary."""
    if model is None:
        if random not in DIMENSIONS:
            raise typer.BadParameter(f"--random {random!r}: one of {', '.join(DIMENSIONS)}")
        return str(random_checkpoint(random, dtype)), int(DIMENSIONS[random]["vocab_size"])
    from quire.models.hf_config import read_config

    return model, int(read_config(resolve(model))["vocab_size"])


def _peers(vs: str) -> list[str]:
    names = [name.strip() for name in vs.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in ("transformers", "vllm"):
            raise typer.BadParameter(f"--vs {name!r}: choose transformers, vllm or none")
    return names


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--peer-env takes NAME=VALUE, not {text!r}")
    return name, value


def _contest(
    entries: list[tuple[str, str, dict[str, Any]]],
    model: str,
    workload: Workload,
    repeats: int,
    output: Path | None,
    peer_python: str | None = None,
    peer_env: list[str] | None = None,
) -> list[Measurement]:
    """Run the sides in turns; print each run as it comes; write the JSON file."""
    vocab_size = max(max(prompt) for prompt in workload.prompts) + 11
    with contextlib.ExitStack() as stack:
        contestants = []
        for label, side, options in entries:
            place: dict[str, Any] = {}
            if side == "vllm":
                variables = dict(_assignment(text) for text in peer_env or ())
                place = {"python": peer_python or sys.executable, "environment": variables}
            contestants.append(
                stack.enter_context(Contestant(label, side, model, options, **place))
            )
        versions = {c.label: c.versions for c in contestants}
        typer.echo(f"{workload.name}; {json.dumps(report.machine())}; {json.dumps(versions)}")
        measurements = alternate(
            contestants,
            workload,
            repeats=repeats,
            warmup=uniform(2, 16, 4, vocab_size=vocab_size),
            on_run=lambda label, figures: typer.echo(f"  {label}: {figures['seconds']:.2f} s"),
        )
    if output is not None:
        document = {
            "workload": workload.name,
            "machine": report.machine(),
            "versions": versions,
            "runs": {m.label: m.runs for m in measurements},
        }
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return measurements


@app.command()
def throughput(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    vs: Vs = "transformers",
    workload: Annotated[
        str,
        typer.Option(help="uniform, mixed, or prefix (against quire without prefix caching)."),
    ] = "uniform",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 32,
    input_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt; most, if mixed.")
    ] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated; most, if mixed.")] = 128,
    prefix_len: Annotated[int, typer.Option(min=1, help="Shared tokens, for prefix.")] = 1024,
    peer_python: PeerPython = None,
    peer_env: PeerEnv = None,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Output tokens per second over many prompts given at once."""
    path, vocab_size = _checkpoint(model, random, dtype)
    options = {"dtype": dtype}
    entries: list[tuple[str, str, dict[str, Any]]] = [("quire", "quire", options)]
    if workload == "uniform":
        work = uniform(num_prompts, input_len, output_len, vocab_size=vocab_size)
    elif workload == "mixed":
        work = mixed(
            num_prompts,
            (min(16, input_len), input_len),
            (min(16, output_len), output_len),
            vocab_size=vocab_size,
        )
    elif workload == "prefix":
        work = shared_prefix(num_prompts, prefix_len, input_len, output_len, vocab_size=vocab_size)
        cold = {**options, "enable_prefix_caching": False}
        entries.append(("quire, no prefix cache", "quire", cold))
    else:
        raise typer.BadParameter(f"--workload {workload!r}: uniform, mixed or prefix")
    if workload != "prefix" or vs != "transformers":
        entries += [(name, name, options) for name in _peers(vs)]
    measurements = _contest(entries, path, work, repeats, json_file, peer_python, peer_env)
    limit = measure_limit()
    seconds = limit.seconds(work, ModelSize.of(resolve(path), vocab_size))
    typer.echo(report.throughput_table(measurements, work.num_output_tokens, seconds))
    typer.echo(
        f"limit: {limit.bytes_per_second / 1e9:.1f} GB/s read, "
        f"{limit.flops / 1e9:.0f} GFLOP/s multiplied"
    )


@app.command()
def latency(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 128,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="With the outputs' text; needs a tokenizer.")
    ] = False,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Time to the first token, and what a step costs: the model's part, and all the rest."""
    path, vocab_size = _checkpoint(model, random, dtype)
    work = uniform(batch, input_len, output_len, vocab_size=vocab_size)
    options = {"dtype": dtype, "detokenize": detokenize}
    [measured] = _contest([("quire", "quire", options)], path, work, repeats, json_file)
    rows = [["figure", "median (range)"]]
    for name, label, digits, scale in (
        ("first_token_seconds", "first token, ms", 1, 1e3),
        ("forward_ms_per_step", "model per step, ms", 3, 1.0),
        ("overhead_ms_per_step", "engine overhead per step, ms", 3, 1.0),
        ("seconds", "all, s", 2, 1.0),
        ("peak_bytes", "peak memory, GB", 2, 1e-9),
    ):
        rows.append([label, report.spread(measured, name, digits, scale)])
    typer.echo(report.table(rows))


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
    figures = measure_products(
        in_features, out_features, dtype, [int(each) for each in rows.split(",")], repeats
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
