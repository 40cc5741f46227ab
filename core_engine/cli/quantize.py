"""``quire quantize``: a model folder with fewer bits, for quire and for other engines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quire.converter.folder import Summary

_TARGETS = "awq, gptq, int8, w8a8, int4 or fp8"


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A plain model: a folder, or a name on the hub.")
    ],
    to: Annotated[str, typer.Option("--to", help=f"What to make of it: {_TARGETS}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale (awq, gptq, int4): 128, 64, 32, or -1 for all.",
            show_default="the largest that divides",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether zero is in the middle of the codes (awq, gptq, int4).",
            show_default="all but awq are, as their readers want them",
        ),
    ] = None,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Take the largest inputs first (gptq).")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Texts that the model is run on (awq, gptq; int4 then has activation-aware "
            "scales): one on each line, or .json or .jsonl.",
            show_default="a few that come with quire",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is there.")
    ] = False,
    max_shard_mib: Annotated[
        int, typer.Option(min=1, help="MiB of a weight file, at most.")
    ] = 4096,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Write a quantized copy of a model.

    awq and gptq are what their readers everywhere know; int8 (weights alone), w8a8 (inputs, too),
    int4 and fp8 are written as compressed-tensors. Embedding and output matrix stay as they are.
    """
    from quire.converter.folder import convert
    from quire.converter.targets import Target
    from quire.converter.texts import read_texts
    from quire.models.hub import resolve
    from quire.utils.progress import auto_tqdm

    target = Target(
        to,
        group_size=group_size,
        symmetric=symmetric,
        by_importance=desc_act,
        calibrated=calibration is not None,
    )
    texts = () if calibration is None else read_texts(calibration)
    folder = resolve(model, revision=revision)
    with auto_tqdm()(
        desc="Projections", unit="matrix", dynamic_ncols=True, file=sys.stderr, disable=None
    ) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = convert(
            folder,
            out.expanduser(),
            target,
            texts=texts,
            overwrite=overwrite,
            shard_bytes=max_shard_mib << 20,
            advance=advance,
        )
    typer.echo(_table(summary))


def _table(summary: Summary) -> str:
    from quire.utils.memory import format_bytes

    before = summary.codes_before + summary.plain_before
    after = summary.codes_after + summary.plain_after
    rows = [
        ("", "before", "after", "share"),
        (f"{summary.num_modules} projections", summary.codes_before, summary.codes_after),
        ("everything else", summary.plain_before, summary.plain_after),
        ("together", before, after),
    ]
    lines = []
    for name, *cells in rows:
        if isinstance(cells[0], int) and isinstance(cells[1], int):
            share = f"{cells[1] / max(cells[0], 1):.0%}"
            cells = [format_bytes(cells[0]), format_bytes(cells[1]), share]
        lines.append(f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells))
    groups = f"groups of {summary.group_size}" if summary.group_size else "one scale per output"
    seen = f", {summary.num_tokens} tokens seen" if summary.num_tokens else ""
    lines.append(f"{summary.folder}: {groups}{seen}, {summary.seconds:.1f} s")
    return "\n".join(lines)
