"""The command ``quire serve``, and ``python -m quire.server``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quire.errors import ConfigError, QuireError


def main(args: Sequence[str] | None = None, prog_name: str = "quire serve") -> None:
    """Serve a model until the process is told to end.

    Parameters
    ----------
    args : sequence of str, optional
        The command line; this process's own unless given.
    prog_name : str
        What it calls itself.
    """
    from quire.server.command_line import CommandLine
    from quire.server.plan import make_plan

    try:
        given = CommandLine(prog_name).read(sys.argv[1:] if args is None else args)
        _check_extra()
        if given.get("data_parallel_backend") == "ray":
            from quire.server.ray_launch import launch_on_ray

            code = launch_on_ray(given)
        else:
            from quire.server.launch import launch

            code = launch(make_plan(given))
    except QuireError as error:
        # The message names what is wrong; a traceback would only hide it.
        sys.stderr.write(f"error: {error}\n")
        code = 1
    except KeyboardInterrupt:  # while the model was loading
        code = 130
    sys.exit(code)


def _check_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"quire serve needs a package that is not installed ({error.name}): "
            "pip install 'quire[server]'"
        ) from None
    del fastapi, prometheus_client, uvicorn
