"""The ``quire`` command and its subcommands.

Nothing heavy is imported before a subcommand runs: ``quire --help`` and ``quire --version`` answer
without torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quire import __version__
from quire.cli.chat import chat
from quire.cli.collect_env import collect_env
from quire.cli.complete import complete
from quire.cli.quantize import quantize
from quire.cli.run_batch import run_batch
from quire.errors import QuireError

app = typer.Typer(
    name="quire",
    help="A self-contained paged-attention LLM engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What stands behind the name of a subcommand goes to another parser, --help included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quire {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Run a model from the command line."""


app.command()(complete)
app.command()(chat)
app.command(name="run-batch")(run_batch)
app.command()(quantize)
app.command(name="collect-env")(collect_env)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure latency, throughput and startup; `quire bench --help` has the subcommands."""
    from quire.bench.cli import app as bench_app

    bench_app(args=context.args, prog_name="quire bench")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a model over HTTP to OpenAI's clients; `quire serve --help` has the options."""
    from quire.server.cli import main as run_server

    run_server(args=context.args, prog_name="quire serve")


@app.command()
def demo() -> None:
    """Show the embedded model at work, through LangChain and in a chat."""
    from quire.demo.__main__ import main as run_demo

    raise typer.Exit(run_demo())


def main() -> None:
    """Run the command that ``sys.argv`` asks for; the entry point of ``quire``."""
    try:
        app()
    except QuireError as error:
        # The message names what is wrong; a traceback would only hide it.
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
