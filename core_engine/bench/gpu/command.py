"""``quire bench gpu``: what a GPU can do, and how much of that quire makes of it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from quire.bench.gpu.part import PARTS
from quire.bench.gpu.run import SECONDS, find_device, run_parts
from quire.bench.gpu.table import figures_table
from quire.bench.options import Json


def gpu(
    parts: Annotated[
        str, typer.Option(help=f"Some of {', '.join(PARTS)}, with commas between.")
    ] = ",".join(PARTS),
    cpu: Annotated[
        bool,
        typer.Option("--cpu", help="On the CPU, at sizes that say nothing: to see that it runs."),
    ] = False,
    time: Annotated[
        float, typer.Option(min=0.1, help="Factor on the time that each part may take.")
    ] = 1.0,
    json_file: Json = None,
) -> None:
    """What a GPU can do, and how much of that quire makes of it: kernels and whole models.

    Copying and a large product are measured first, and everything else is a share of these. Models
    have random weights, made on the device. Each part is a process of its own with a time of its
    own.
    """
    names = [each.strip() for each in parts.split(",")]
    for name in names:
        if name not in PARTS:
            raise typer.BadParameter(f"--parts {name!r}: some of {', '.join(PARTS)}")
    device = "cpu" if cpu else find_device()
    if device is None:
        raise typer.BadParameter("torch finds no GPU here; --cpu runs all parts at tiny sizes")
    longest = sum(SECONDS[name] for name in {*names, "ceilings"}) * time
    typer.echo(f"at most {longest:.0f} s", err=True)
    results = run_parts(
        names, device=device, tiny=cpu, scale=time, tell=lambda line: typer.echo(line, err=True)
    )
    versions = ", ".join(f"{name} {value}" for name, value in results.versions.items() if value)
    typer.echo(f"{results.device}: {versions}\n\n{figures_table(results)}")
    if json_file is not None:
        document = {
            "device": results.device,
            "versions": results.versions,
            "figures": [each.to_message() for each in results.figures],
            "problems": results.problems,
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if results.problems:
        raise typer.Exit(1)
