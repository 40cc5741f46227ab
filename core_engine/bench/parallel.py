"""``quire bench parallel``: one model on two ranks beside one, and the model on paper of more."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from quire.bench import paper, ray_cost, report
from quire.bench.gguf import TYPES
from quire.bench.options import Checkpoint, Dtype, Json, Model, Random, Seed, find_checkpoint
from quire.bench.parallel_runs import (
    OVERHEAD_MS,
    Done,
    Hardware,
    count_traffic,
    divisions,
    measure_ranks,
)
from quire.bench.parallel_tables import (
    differences,
    hardware_table,
    model_table,
    predictions,
    speed_table,
    traffic_table,
)
from quire.bench.traffic import Shape
from quire.bench.workload import Workload, uniform
from quire.errors import QuireError
from quire.kernels.cpu.backend import why_missing
from quire.models.hf_config import max_length
from quire.utils.threads import count_threads

PARTS = ("measured", "paper")
_BLOCK = 16
_NATIVE = ("bfloat16", "float32")


def parallel(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    parts: Annotated[str, typer.Option(help="What to do, some of them with commas.")] = ",".join(
        PARTS
    ),
    batches: Annotated[str, typer.Option(help="Prompts at once, with commas.")] = "1,16",
    input_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt that decoding goes on from.")
    ] = 33,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 33,
    chunk: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt that is only read; 0: none is.")
    ] = 512,
    ray: Annotated[
        bool, typer.Option("--ray", help="Measure what a router's calls cost, by starting Ray.")
    ] = False,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 5,
    json_file: Json = None,
) -> None:
    """Two ranks beside one: tokens per second, what they hand each other, and more on paper."""
    names = [name.strip() for name in parts.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise typer.BadParameter(f"--parts {name!r}: some of {', '.join(PARTS)}")
    if dtype not in TYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: one of {', '.join(TYPES)}")
    words = [word.strip() for word in batches.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise typer.BadParameter(f"--batches {batches!r}: numbers from 1 on, with commas between")
    if ray and not ray_cost.is_there():
        raise typer.BadParameter("--ray: Ray is not installed; pip install ray")
    document: dict[str, Any] = {"machine": report.machine()}
    overhead = paper.Overhead()
    try:
        if "measured" in names:
            checkpoint = find_checkpoint(model, random, dtype)
            if max(chunk + 1, input_len + output_len) > max_length(checkpoint.config):
                raise typer.BadParameter(
                    f"{checkpoint.name} takes {max_length(checkpoint.config)} tokens: lower "
                    "--input-len, --output-len or --chunk"
                )
            size, counts = checkpoint.vocab_size, sorted({int(word) for word in words})
            # All but the last token of a prompt fill blocks, and are found in the cache.
            length = max(1, (input_len - 1) // _BLOCK * _BLOCK + 1)
            workloads = [uniform(n, length, output_len, vocab_size=size, seed=seed) for n in counts]
            if chunk:
                workloads.append(uniform(1, chunk, 1, vocab_size=size, seed=seed))
            document["measured"], overhead = _measured(checkpoint, dtype, workloads, repeats)
        if "paper" in names:
            document["paper"] = _paper(overhead, ray)
    except QuireError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def why_not_native(dtype: str) -> str | None:
    """Return why ranks do not compute by the native kernels here, which alone count; None: do."""
    if dtype not in _NATIVE:
        return f"the native kernels compute in {' or '.join(_NATIVE)}, not in {dtype}"
    return why_missing()


def _measured(
    checkpoint: Checkpoint, dtype: str, workloads: list[Workload], repeats: int
) -> tuple[dict[str, Any], paper.Overhead]:
    """Measure, print the tables, and return the figures, and what the engine takes of a step."""
    try:
        shape = Shape.of(checkpoint.config)
    except ValueError as error:
        raise typer.BadParameter(f"{checkpoint.name}: {error}, is not measured here") from error
    typer.echo(f"{checkpoint.name}; {json.dumps(report.machine())}")
    reason = why_not_native(dtype)
    if reason is not None:
        typer.echo(f"ranks are left out, for nobody counts what they exchange: {reason}")
    num_threads = count_threads()
    sides = divisions(num_threads, with_ranks=reason is None)
    longest = max(len(w.prompts[0]) + w.output_lens[0] for w in workloads)
    most = max(len(w.prompts) for w in workloads)
    chunk = max((len(w.prompts[0]) for w in workloads if w.output_lens[0] == 1), default=1)
    options = {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": most,
        # All prompts of a run, and a chunk, in one step.
        "max_num_batched_tokens": max(chunk, most * len(workloads[0].prompts[0]), longest),
        "num_gpu_blocks_override": 2 + sum(
            len(w.prompts) * -(-(len(w.prompts[0]) + w.output_lens[0]) // _BLOCK)
            for w in workloads
        ),
        "block_size": _BLOCK,
    }  # fmt: skip
    done, hardware, versions = measure_ranks(
        str(checkpoint.folder),
        sides,
        workloads,
        options,
        num_threads=num_threads,
        probe_numbers=max(most, chunk) * shape.hidden_size,
        repeats=repeats,
        say=typer.echo,
    )
    for each in done:
        kind = "decode" if each.is_decode else "prefill"
        typer.echo(f"\n{kind}, {each.workload.name}\n{speed_table(each)}")
    counted = {each.workload.name: count_traffic(each, shape) for each in done}
    if reason is None:
        typer.echo(f"\nbytes that a rank hands over in a step\n{traffic_table(counted)}")
        for line in differences(counted):
            typer.echo(line)
    typer.echo(f"\nthis machine\n{hardware_table(hardware)}")
    item_bytes = 4.0 if dtype == "float32" else 2.0
    predicted = predictions(done, hardware, shape, item_bytes)
    typer.echo(f"\nthe model on paper, of these cases\n{model_table(predicted)}")
    figures = {
        "model": checkpoint.name,
        "versions": versions,
        "options": options,
        "left_out": reason,
        "hardware": hardware.measured.runs,
        "workloads": {
            each.workload.name: {
                division.label: {"runs": measurement.runs}
                for division, measurement in each.measurements
            }
            for each in done
        },
        "traffic": {
            name: [{**dataclasses.asdict(each), "agrees": each.agrees} for each in ranks]
            for name, ranks in counted.items()
        },
        "predictions": [
            {"workload": p.workload, "side": p.label, **dataclasses.asdict(p.time)}
            for p in predicted
        ],
    }
    return figures, _overhead(done, hardware)


def _overhead(done: list[Done], hardware: Hardware) -> paper.Overhead:
    """Return what the engine took of the steps of one process, by the number of sequences."""
    points = {}
    for each in done:
        if each.is_decode:
            _, measurement = each.measurements[0]
            points[len(each.workload.prompts)] = 1e-3 * measurement.median(OVERHEAD_MS)
    return paper.Overhead.through(points)


def _paper(overhead: paper.Overhead, with_ray: bool) -> dict[str, Any]:
    """Print the tables of machines that are not here, and return the figures."""
    router, told = paper.ROUTER, "assumed"
    if with_ray:
        request, token = ray_cost.measure_ray()
        router = dataclasses.replace(router, request_seconds=request, token_seconds=token)
        told = "measured here"
    machines = {name: dataclasses.asdict(each) for name, each in paper.GPUS.items()}
    inputs = "; ".join(
        f"{name}: {each.bandwidth / 1e12:.2f} TB/s, {each.flops / 1e12:.0f} TFLOP/s, "
        f"{each.memory_bytes / 1e9:.0f} GB, {each.link / 1e9:.0f} GB/s of the others, "
        f"{1e6 * each.latency:.0f} us an exchange"
        for name, each in paper.GPUS.items()
    )
    made, fleets = paper.sheets(overhead), paper.fleets(overhead, router)
    typer.echo(
        f"\n70B on 8 GPUs, on paper: context {paper.CONTEXT}; inputs: {inputs}; "
        f"engine {1e3 * overhead.step:.3f} ms and {1e3 * overhead.row:.4f} ms a sequence\n"
        + paper.sheet_table(made)
    )
    requests = paper.REQUESTS
    typer.echo(
        f"\n{paper.REPLICAS} replicas behind Ray, on paper: {paper.SEQS} requests at once in each, "
        f"of {requests.prompt_len} tokens, {requests.prefix_len} of them a prefix, and "
        f"{requests.output_len} generated; a router's {1e3 * router.request_seconds:.2f} ms a "
        f"request and {1e6 * router.token_seconds:.0f} us a token are {told}\n"
        + paper.fleet_table(fleets)
    )
    return {
        "machines": machines,
        "overhead": dataclasses.asdict(overhead),
        "router": {**dataclasses.asdict(router), "told": told},
        "requests": dataclasses.asdict(requests),
        "steps": [dataclasses.asdict(each) for each in made],
        "fleets": [dataclasses.asdict(each) for each in fleets],
    }
