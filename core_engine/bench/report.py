"""Report: measurements as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from quire.bench.contest import Measurement


def machine() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, operating system, Python."""
    model = platform.processor()
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                wanted = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
                flags = sorted(wanted & set(value.split()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "features": flags,
        "cores": cores,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def table(rows: list[list[str]]) -> str:
    """Return rows, the first a heading, as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def spread(measurement: Measurement, name: str, digits: int = 2, scale: float = 1.0) -> str:
    """Return ``median (least-greatest)`` of a figure, or a dash where it was not measured."""
    if name not in measurement.runs:
        return "-"
    low, high = (scale * value for value in measurement.spread(name))
    return f"{scale * measurement.median(name):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def throughput_table(
    measurements: list[Measurement], num_output_tokens: int, limit_seconds: float
) -> str:
    """Return seconds, tokens per second, and ratios to the last side and to the limit.

    Parameters
    ----------
    measurements : list of Measurement
        The last is the baseline.
    num_output_tokens : int
    limit_seconds : float
        The least time on this machine.
    """
    baseline = measurements[-1].median("seconds")
    rows = [["side", "seconds: median (range)", "output tok/s", "speed-up", "of limit", "peak GB"]]
    for measurement in measurements:
        seconds = measurement.median("seconds")
        rows.append(
            [
                measurement.label,
                spread(measurement, "seconds"),
                f"{num_output_tokens / seconds:.1f}",
                f"{baseline / seconds:.2f}x",
                f"{limit_seconds / seconds:.0%}",
                spread(measurement, "peak_bytes", scale=1e-9),
            ]
        )
    rate = num_output_tokens / limit_seconds
    rows.append(["limit", f"{limit_seconds:.2f}", f"{rate:.1f}", "", "100%", ""])
    return table(rows)
