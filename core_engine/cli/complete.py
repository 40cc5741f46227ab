"""``quire complete``: prompts in, completions out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.options import (
    ApiKey,
    Dtype,
    EngineArgs,
    EngineOptions,
    Lora,
    MaxModelLen,
    Model,
    SamplingArgs,
    SamplingOptions,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Url,
    make_speaker,
)

if TYPE_CHECKING:
    from quire.cli.speaker import Completion


def complete(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="Texts to complete; none reads standard input, less a final newline.",
        ),
    ] = None,
    model: Model = None,
    lora: Lora = None,
    url: Url = None,
    api_key: ApiKey = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArgs = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate.", show_default="128")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Completions per prompt.", show_default="1")
    ] = None,
    seed: Seed = None,
    stop: Stop = None,
    sampling_arg: SamplingArgs = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per completion.")
    ] = False,
) -> None:
    """Complete prompts. A single completion is shown as it is written."""
    texts = prompts or [_read_standard_input()]
    engine = EngineOptions(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        engine_args=engine_arg,
        lora=lora,
    )
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        sampling_args=sampling_arg,
        n=n,
        default_max_tokens=128,
    )
    with make_speaker(engine, sampling, url, api_key) as speaker:
        if len(texts) == 1 and speaker.num_completions == 1 and not as_json:
            for piece in speaker.stream(texts[0]):
                typer.echo(piece, nl=False)
            typer.echo()
            return
        for completion in speaker.complete(texts):
            if as_json:
                typer.echo(json.dumps(asdict(completion), ensure_ascii=False))
            else:
                _show(completion, len(texts) > 1, speaker.num_completions > 1)


def _read_standard_input() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    # `echo` ends what it writes with a newline, after which a model would say something else.
    return sys.stdin.read().removesuffix("\n")


def _show(completion: Completion, titled: bool, numbered: bool) -> None:
    if titled and completion.index == 0:
        typer.echo(f"== {completion.prompt}")
    if numbered:
        typer.echo(f"-- {completion.index}")
    typer.echo(completion.text)
