"""The command ``vllm``, as far as quire has the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_SAME = {
    "chat": "chat",
    "complete": "complete",
    "run-batch": "run-batch",
    "collect-env": "collect-env",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Parameters
    ----------
    args : sequence of str, optional
        This process's own unless given.

    Returns
    -------
    int
        The process's exit code.
    """
    from quire.integrations.vllm.release import VERSION

    words = list(sys.argv[1:] if args is None else args)
    name = words[0] if words else "--help"
    if name == "serve":
        from quire.integrations.vllm.server import main as serve

        serve(words[1:])
    if name in ("--version", "-v"):
        sys.stdout.write(f"{VERSION}\n")
        return 0
    if name in _SAME:
        from quire.cli.app import app

        app(args=[_SAME[name], *words[1:]], prog_name="vllm")
        return 0
    known = ", ".join(["serve", *_SAME])
    if name in ("--help", "-h"):
        sys.stdout.write(f"vllm {VERSION}: quire under its names. Subcommands: {known}\n")
        return 0
    sys.stderr.write(
        f"error: there is no {name!r} here; there are: {known}. `quire --help` has quire's own\n"
    )
    return 2
