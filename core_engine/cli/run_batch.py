"""``quire run-batch``: a file of requests in, a file of answers out."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.options import Dtype, EngineArgs, EngineOptions, MaxModelLen, Model

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.server.batch.results import ResultFile
    from quire.server.batch.run import Summary
    from quire.server.settings import ServerSettings

_INTERRUPTED = 130  # as shells have it for Ctrl-C


def run_batch(
    input_file: Annotated[
        Path,
        typer.Option(
            "--input-file",
            "-i",
            exists=True,
            dir_okay=False,
            help="JSON lines of custom_id, method, url and body, as OpenAI's batches have them.",
        ),
    ],
    output_file: Annotated[
        Path,
        typer.Option("--output-file", "-o", dir_okay=False, help="Gets a line for each answer."),
    ],
    model: Model = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What bodies call the model; may be repeated.", show_default="as --model"
        ),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="A LoRA adapter, and what bodies call it; may be repeated."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--overwrite",
            help="Keep the answers that the output has, and go on; or begin anew.",
        ),
    ] = True,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests at once.",
            show_default="twice the most that the engine runs at once",
        ),
    ] = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArgs = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How calls of tools are read.", show_default="the template's")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="How reasoning is read.", show_default="the template's")
    ] = None,
) -> None:
    """Answer the requests of a file in this process, as a server would.

    An interrupted run is continued by the same command. Status 1 says that a request failed.
    """
    if output_file.exists() and output_file.samefile(input_file):
        raise typer.BadParameter("the output must be another file", param_hint="--output-file")
    if not output_file.parent.is_dir():
        raise typer.BadParameter(
            f"there is no folder {output_file.parent}", param_hint="--output-file"
        )
    engine = EngineOptions(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        engine_args=engine_arg,
        lora_modules=lora_modules,
    )
    try:
        from quire.server.adapter_names import check_adapter_names
        from quire.server.batch.results import ResultFile
        from quire.server.settings import ServerSettings
    except ImportError as error:
        raise typer.BadParameter(_no_server(error)) from error
    with ResultFile(output_file, resume=resume) as results, engine.make_llm() as llm:
        names = tuple(served_model_name or (llm.config.model.model,))
        settings = ServerSettings(
            served_model_names=names,
            trust_request_chat_template=True,  # the file is of who runs this
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
        )
        check_adapter_names([each.lora_name for each in llm.list_loras()], settings)
        most = max_concurrency or 2 * llm.config.scheduler.max_num_seqs
        try:
            summary = asyncio.run(_run(llm, settings, input_file, results, most))
        except KeyboardInterrupt:
            typer.echo("stopped: the same command goes on from here", err=True)
            raise typer.Exit(_INTERRUPTED) from None
    typer.echo(
        f"{summary.succeeded} answered, {summary.failed} failed, "
        f"{summary.skipped} answered before: {output_file}",
        err=True,
    )
    if summary.failed:
        raise typer.Exit(1)


def _no_server(error: ImportError) -> str:
    return f"this needs the packages of the server: pip install 'quire[server]' ({error})"


async def _run(
    llm: LLM, settings: ServerSettings, input_file: Path, results: ResultFile, concurrency: int
) -> Summary:
    from quire.async_llm import AsyncLLM
    from quire.server.app import build_app
    from quire.server.batch.lines import count_lines, read_lines
    from quire.server.batch.run import run_batch as answer_all
    from quire.server.service import Service
    from quire.utils.progress import auto_tqdm

    async_llm = AsyncLLM.from_llm(llm)
    app = build_app(Service(async_llm, settings, llm.get_tokenizer()))
    total = count_lines(input_file)
    with auto_tqdm()(total=total, desc="Requests", unit="request", dynamic_ncols=True) as bar:

        def advance(summary: Summary) -> None:
            if summary.failed:
                bar.set_postfix(failed=summary.failed, refresh=False)
            bar.update()

        def complain(text: str) -> None:
            bar.write(text, file=sys.stderr)

        async with app.router.lifespan_context(app):
            return await answer_all(
                app,
                read_lines(input_file),
                results,
                concurrency=max(1, min(concurrency, total)),
                advance=advance,
                complain=complain,
            )
