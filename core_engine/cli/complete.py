"""``quire complete``: prompts in, completions out."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.options import (
    Dtype,
    EngineArgs,
    EngineOptions,
    MaxModelLen,
    Model,
    SamplingArgs,
    SamplingOptions,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.outputs import RequestOutput
    from quire.sampling_params import SamplingParams


def complete(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="Texts to complete; none reads standard input, less a final newline.",
        ),
    ] = None,
    model: Model = None,
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
        model=model, dtype=dtype, max_model_len=max_model_len, engine_args=engine_arg
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
    with engine.make_llm() as llm:
        params = sampling.make_params(llm)
        if len(texts) == 1 and params.num_sequences == 1 and not as_json:
            _stream(llm, texts[0], params)
            return
        for output in llm.generate(texts, params, use_tqdm=False):
            _show(output, as_json=as_json, titled=len(texts) > 1)


def _read_standard_input() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    # `echo` ends what it writes with a newline, after which a model would say something else.
    return sys.stdin.read().removesuffix("\n")


def _stream(llm: LLM, text: str, params: SamplingParams) -> None:
    for output in llm.stream(text, params):
        for completion in output.outputs:
            typer.echo(completion.text, nl=False)
    typer.echo()


def _show(output: RequestOutput, *, as_json: bool, titled: bool) -> None:
    if as_json:
        for completion in output.outputs:
            record = {
                "prompt": output.prompt,
                "index": completion.index,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            typer.echo(json.dumps(record, ensure_ascii=False))
        return
    if titled:
        typer.echo(f"== {output.prompt}")
    for completion in output.outputs:
        if len(output.outputs) > 1:
            typer.echo(f"-- {completion.index}")
        typer.echo(completion.text)
