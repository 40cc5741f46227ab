"""The figures as a dated table, between two marks of a README."""

from __future__ import annotations

import datetime
from pathlib import Path

from quire.bench import report
from quire.bench.gpu.figure import HEADINGS
from quire.bench.gpu.run import Results

BEGIN = "<!-- gpu-check: begin, written by `make gpu-check` -->"
END = "<!-- gpu-check: end -->"


def figures_table(results: Results) -> str:
    """Return all figures as a Markdown table."""
    return report.table([HEADINGS, *(each.cells() for each in results.figures)])


def section(results: Results, checks: list[str]) -> str:
    """Return what stands between the marks.

    Parameters
    ----------
    results : Results
    checks : list of str
        A line for each operation that was compared.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = ", ".join(f"{name} {value}" for name, value in results.versions.items() if value)
    lines = [f"Measured on {today}: **{results.device}**, {versions}.", ""]
    if checks:
        lines += ["Compared with the reference:", "", *(f"- {each}" for each in checks), ""]
    lines.append(figures_table(results))
    if results.problems:
        lines += ["", "Left out:", "", *(f"- {each}" for each in results.problems)]
    return "\n".join(lines)


def write_section(path: Path, text: str) -> None:
    """Replace what stands between the marks of a file.

    Raises
    ------
    ValueError
        It has no such marks.
    """
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {BEGIN!r} and {END!r}")
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    unfinished.replace(path)
