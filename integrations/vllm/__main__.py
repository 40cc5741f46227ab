"""``python -m quire.integrations.vllm``: run a script, or turn the stand-in on and off."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from quire.integrations.vllm import StandInError, install
from quire.integrations.vllm.activation import disable, enable

_USAGE = """\
usage: python -m quire.integrations.vllm [--force] SCRIPT.py [arguments]
       python -m quire.integrations.vllm [--force] -m MODULE [arguments]
       python -m quire.integrations.vllm enable [--force]
       python -m quire.integrations.vllm disable

Runs a script or a module that imports vllm, unmodified, on quire; or has every Python of this
environment serve `import vllm`, the command `vllm` included. --force: also where a real vLLM is.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Do what a command line says.

    Parameters
    ----------
    args : sequence of str, optional
        This process's own unless given.

    Returns
    -------
    int
        The process's exit code.
    """
    words = list(sys.argv[1:] if args is None else args)
    force = bool(words) and words[0] == "--force"
    words = words[1:] if force else words
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if words else 2
    try:
        if words[0] in ("enable", "disable"):
            return _switch(words, force)
        return _run(words, force)
    except StandInError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _switch(words: list[str], force: bool) -> int:
    others = [word for word in words[1:] if word != "--force"]
    if others:
        sys.stderr.write(f"error: {words[0]} takes no {others[0]!r}\n")
        return 2
    if words[0] == "enable":
        lines = ["written:", *map(str, enable(force=force or "--force" in words))]
    else:
        lines = [
            "removed:",
            *([str(path) for path in disable()] or ["nothing: it was not enabled"]),
        ]
    sys.stdout.write("\n  ".join(lines) + "\n")
    return 0


def _run(words: list[str], force: bool) -> int:
    if words[0] == "-m":
        if len(words) < 2:
            sys.stderr.write("error: -m needs the name of a module\n")
            return 2
        install(force=force)
        sys.argv = words[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return 0
    script = Path(words[0])
    if not script.is_file():
        sys.stderr.write(f"error: there is no script {words[0]!r}\n{_USAGE}")
        return 2
    install(force=force)
    sys.argv = words
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
