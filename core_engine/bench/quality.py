"""``quire bench quality``: what fewer bits cost the demo model, in perplexity and right answers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench import report
from quire.bench.contest import BenchError
from quire.bench.options import Json
from quire.bench.sides import quire_versions
from quire.demo import MODEL_NAME
from quire.demo.evaluate import score, with_llm
from quire.demo.perplexity import held_out_samples, perplexity
from quire.demo.samples import Question, Sample
from quire.demo.text import evaluation_sets, training_samples
from quire.errors import QuireError

BASE = "plain"
"""bfloat16, as the model ships."""
_CALIBRATING = 64
"""Training texts that are given to calibrate with, wherever that is done."""

OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "int4": {"quantization": "int4"},
    "int4-head": {"quantization": "int4", "quantization_config": {"lm_head": "int4"}},
    "int4-calibrated": {"quantization": "int4", "quantization_config": {"calibration": []}},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
}
"""Engine arguments by name; an empty calibration is filled with prompts."""

WRITTEN = ("awq", "gptq")
"""Formats of folders that ``quire quantize`` writes."""

NAMES = (*OPTIONS, *WRITTEN)


@dataclass(frozen=True, slots=True)
class Quality:
    """How well the model did in one format.

    Attributes
    ----------
    name : str
    perplexity : float
    right : dict of str to int
        Right answers by the set of questions.
    """

    name: str
    perplexity: float
    right: dict[str, int]


def quality(
    formats: Annotated[
        str, typer.Option(help=f"Some of {', '.join(NAMES)}; the first is what ratios are to.")
    ] = ",".join(NAMES),
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts for the perplexity.")] = 400,
    questions: Annotated[
        int | None,
        typer.Option(min=0, help="Of each held-out set at most.", show_default="all"),
    ] = None,
    json_file: Json = None,
) -> None:
    """The demo model in each format: perplexity and right answers on what it was not trained on."""
    names = list(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise typer.BadParameter(f"--formats {name!r}: some of {', '.join(NAMES)}")
    if not names:
        raise typer.BadParameter(f"--formats {formats!r}: some of {', '.join(NAMES)}")
    samples = held_out_samples(texts)
    sets = {name: asked[:questions] for name, asked in evaluation_sets().items()}
    done = []
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as scratch:
        try:
            for name in names:
                model, options = _model(name, Path(scratch))
                done.append(measure(name, model, options, samples, sets))
                typer.echo(f"  {name}: perplexity {done[-1].perplexity:.4f}")
        except QuireError as error:
            raise typer.BadParameter(str(error)) from error
    asked = sum(map(len, sets.values()))
    typer.echo("\n" + table(done, asked))
    if json_file is not None:
        document = {
            "model": MODEL_NAME,
            "machine": report.machine(),
            "versions": quire_versions(),
            "texts": texts,
            "asked": {name: len(asked) for name, asked in sets.items()},
            "formats": {
                each.name: {"perplexity": each.perplexity, "right": each.right} for each in done
            },
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _model(name: str, scratch: Path) -> tuple[str, dict[str, Any]]:
    """Return what is loaded for a format, and with which engine arguments."""
    if name in OPTIONS:
        options = json.loads(json.dumps(OPTIONS[name]))
        if "calibration" in options.get("quantization_config", {}):
            options["quantization_config"]["calibration"] = _calibration()
        return MODEL_NAME, options
    texts, folder = scratch / f"{name}.json", scratch / name
    texts.write_text(json.dumps(_calibration()), encoding="utf-8")
    words = ["quantize", MODEL_NAME, "--to", name, "--out", str(folder)]
    words += ["--calibration", str(texts)]
    run = subprocess.run(
        [sys.executable, "-m", "quire", *words], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise BenchError(f"quire {' '.join(words)}: {run.stderr.strip()[-2000:]}")
    return str(folder), {}


def _calibration() -> list[str]:
    return [sample.text for sample in islice(training_samples(0), _CALIBRATING)]


def measure(
    name: str,
    model: str,
    options: dict[str, Any],
    samples: Sequence[Sample],
    sets: dict[str, list[Question]],
) -> Quality:
    """Load a model with engine arguments, and measure it.

    Parameters
    ----------
    name : str
        What tables call it.
    model : str
    options : dict
    samples : sequence of Sample
        For the perplexity.
    sets : dict of str to list of Question
        For the right answers.
    """
    from quire import LLM

    with LLM(model, **options) as llm:
        greedy, _ = with_llm(llm)
        right = {title: score(title, asked, greedy).right for title, asked in sets.items() if asked}
        return Quality(name, perplexity(llm, samples), right)


def table(done: Sequence[Quality], asked: int) -> str:
    """Return all formats as a Markdown table, beside the first.

    Parameters
    ----------
    done : sequence of Quality
    asked : int
        Questions.
    """
    base = done[0]
    rows = [["weights", "perplexity", f"vs {base.name}", f"right of {asked:,}", "accuracy"]]
    for each in done:
        right = sum(each.right.values())
        rows.append(
            [
                each.name,
                f"{each.perplexity:.4f}",
                f"{each.perplexity / base.perplexity - 1:+.2%}",
                f"{right:,}",
                f"{right / asked:.1%}" if asked else "-",
            ]
        )
    return report.table(rows)
