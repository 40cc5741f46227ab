"""``python -m vllm.entrypoints.openai.api_server``: ``quire serve`` by vLLM's flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from quire.integrations.vllm.command_line import serve_words


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Serve a model until the process is told to end.

    Parameters
    ----------
    args : sequence of str, optional
        vLLM's flags; this process's own unless given.
    """
    from quire.server.cli import main as serve

    words = list(sys.argv[1:] if args is None else args)
    serve(serve_words(words), "vllm serve")
    raise AssertionError("it exits")


def run_server(args: Sequence[str] | None = None) -> NoReturn:
    """Do the same."""
    main(args)


def run_batch(args: Sequence[str] | None = None) -> NoReturn:
    """Answer the requests of a file, as ``quire run-batch`` does."""
    from quire.cli.app import app

    words = list(sys.argv[1:] if args is None else args)
    app(args=["run-batch", *words], prog_name="vllm")
    raise SystemExit(0)
