"""``quire bench serve``: a server under load, beside the engine alone on the same requests."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from quire.bench import report
from quire.bench.contest import BenchError, Contestant, Measurement
from quire.bench.gguf import TYPES
from quire.bench.load import Target, draw_starts, run_load
from quire.bench.options import (
    Checkpoint,
    Dtype,
    Json,
    Model,
    Random,
    Repeats,
    Seed,
    find_checkpoint,
)
from quire.bench.server import Server
from quire.bench.serving import add_comparison, figures_of, parse_goodput, serving_table
from quire.bench.tokens import make_tokenizer
from quire.bench.workload import Workload, mixed, uniform
from quire.models.hf_config import max_length

_EVERY_VOCABULARY = 512  # ids below it are tokens of any model
_MIN_LEN = 16  # least of mixed lengths


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server, run by run.

    Attributes
    ----------
    num_prompts, input_len, output_len : int
    is_mixed : bool
        Whether the lengths are drawn, up to those.
    vocab_size : int
    rate : float or None
        Requests per second; None is all at once.
    concurrency : int or None
    seed : int
    """

    num_prompts: int
    input_len: int
    output_len: int
    is_mixed: bool
    vocab_size: int
    rate: float | None
    concurrency: int | None
    seed: int

    def workload(self, run: int) -> Workload:
        """Return a run's prompts: others in each, so that no prefix cache knows them.

        Run 0 is the one that is not counted.
        """
        size, seed = self.vocab_size, 1_000 * self.seed + run
        if not self.is_mixed:
            count = self.num_prompts
            return uniform(count, self.input_len, self.output_len, vocab_size=size, seed=seed)
        ins = min(_MIN_LEN, self.input_len), self.input_len
        outs = min(_MIN_LEN, self.output_len), self.output_len
        return mixed(self.num_prompts, ins, outs, vocab_size=size, seed=seed)

    def starts(self, run: int) -> list[float]:
        """Return when a run's requests begin."""
        return draw_starts(self.num_prompts, self.rate, 1_000 * self.seed + run)

    def num_output_tokens(self, repeats: int) -> list[int]:
        """Return how many tokens each counted run generates."""
        return [self.workload(run).num_output_tokens for run in range(1, repeats + 1)]

    def __str__(self) -> str:
        rate = "all at once" if self.rate is None else f"{self.rate:g} requests/s"
        most = "" if self.concurrency is None else f", at most {self.concurrency} at a time"
        return f"{self.workload(0).name}, {rate}{most}"


def serve(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    url: Annotated[
        str | None,
        typer.Option(help="A server that runs, as http://localhost:8000/v1; else one is started."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Of --url.", show_default="the first that it names")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For --url.", envvar="QUIRE_API_KEY", show_envvar=True)
    ] = None,
    server_arg: Annotated[
        list[str] | None,
        typer.Option(help="A word for `quire serve`, as --server-arg=--max-num-seqs=64."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 64,
    workload: Annotated[str, typer.Option(help="uniform or mixed: the prompts' lengths.")] = (
        "uniform"
    ),
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt; most, if mixed.")] = (
        128
    ),
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated; most, if mixed.")] = 128,
    request_rate: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="Requests per second, a Poisson process.", show_default="all at once"
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests at a time.", show_default="all")
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS",
            help="Limits of a good request: ttft:500, tpot:50, itl:100, e2e:9000.",
        ),
    ] = None,
    offline: Annotated[
        bool | None,
        typer.Option(
            "--offline/--no-offline",
            help="Measure quire.LLM on the same requests, in turns.",
            show_default="if all come at once and the model is here",
        ),
    ] = None,
    seed: Seed = 0,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Time to the first token, between tokens, throughput and goodput over HTTP."""
    if workload not in ("uniform", "mixed"):
        raise typer.BadParameter(f"--workload {workload!r}: uniform or mixed")
    if dtype not in TYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: one of {', '.join(TYPES)}")
    try:
        limits = parse_goodput(goodput or [])
    except ValueError as error:
        raise typer.BadParameter(f"--goodput {error}") from error
    if url is not None and server_arg:
        raise typer.BadParameter(f"--server-arg is for a server that is started, and {url} runs")
    if url is not None and not _is_web(url):
        raise typer.BadParameter(f"--url {url!r}: such as http://localhost:8000/v1")
    is_here = url is None or model is not None
    if offline and not (is_here and request_rate is None):
        why = "with --url it needs --model" if not is_here else "it gets all requests at once"
        raise typer.BadParameter(f"--offline: {why}")
    beside = is_here and request_rate is None if offline is None else offline
    checkpoint = find_checkpoint(model, random, dtype) if is_here else None
    load = Load(
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        is_mixed=workload == "mixed",
        vocab_size=_EVERY_VOCABULARY if checkpoint is None else checkpoint.vocab_size,
        rate=request_rate,
        concurrency=max_concurrency,
        seed=seed,
    )
    if api_key is not None:
        api_key = api_key.split(",")[0].strip()  # a server's variable may have several
    name = str(url) if checkpoint is None else checkpoint.name
    typer.echo(f"{name}, {load}; {json.dumps(report.machine())}")
    with ExitStack() as stack:
        options = {} if checkpoint is None else _engine_options(checkpoint, model, dtype, load)
        versions = {}
        contestant = None
        if beside and checkpoint is not None:
            most = {} if max_concurrency is None else {"max_num_seqs": max_concurrency}
            contestant = stack.enter_context(
                Contestant(
                    "offline",
                    "quire",
                    str(checkpoint.folder),
                    {**options, **most, "detokenize": True},
                    sys.executable,
                )
            )
            versions["offline"] = contestant.versions
        if url is None:
            assert checkpoint is not None
            words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
            words += server_arg or []
            url = stack.enter_context(Server(str(checkpoint.folder), words)).url
        target = Target(url, served_model_name or _first_model(url, api_key), api_key)
        measured = _alternate(target, contestant, load, limits, repeats, typer.echo)
    typer.echo("")
    typer.echo(serving_table(measured))
    if json_file is not None:
        document = {
            "model": name,
            "workload": str(load),
            "output_tokens": load.num_output_tokens(repeats),
            "request_rate": request_rate,
            "max_concurrency": max_concurrency,
            "goodput_ms": limits,
            "options": options,
            "server_args": server_arg or [],
            "machine": report.machine(),
            "versions": versions,
            "runs": {each.label: each.runs for each in measured},
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _engine_options(
    checkpoint: Checkpoint, model: str | None, dtype: str, load: Load
) -> dict[str, Any]:
    """Return what both engines are made with."""
    total, most = load.input_len + load.output_len, max_length(checkpoint.config)
    if total > most:
        raise typer.BadParameter(
            f"a prompt and its output have up to {total} tokens together, and {checkpoint.name} "
            f"takes {most}: lower --input-len or --output-len"
        )
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": min(max(1024, total), most)}
    if model is None:
        options["tokenizer"] = str(
            make_tokenizer(checkpoint.vocab_size, checkpoint.config["eos_token_id"])
        )
    return options


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port out of range
        return False


def _first_model(url: str, api_key: str | None) -> str:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{url} names no model: {error}") from error


def _alternate(
    target: Target,
    contestant: Contestant | None,
    load: Load,
    limits: dict[str, float],
    repeats: int,
    say: Callable[[str], None],
) -> list[Measurement]:
    """Let both sides run each run's requests, one after the other; the first run is not counted."""
    served = Measurement("served")
    offline = Measurement("offline")
    sides = [served] if contestant is None else [served, offline]
    for run in range(repeats + 1):
        workload = load.workload(run)
        figures = [
            figures_of(run_load(target, workload, load.starts(run), load.concurrency), limits)
        ]
        if contestant is not None:
            alone = contestant.run(workload)
            alone["output_tokens_per_second"] = workload.num_output_tokens / alone["seconds"]
            figures.append(alone)
        if run == 0:
            continue
        for side, each in zip(sides, figures, strict=True):
            side.add(each)
            say(f"  {side.label}: {each['seconds']:.2f} s")
    if contestant is not None:
        add_comparison(served, offline, load.num_output_tokens(repeats))
    return sides
