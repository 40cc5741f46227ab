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
    measurements: list[Measurement], limit_seconds: float, limit_rate: float
) -> str:
    """Return seconds, tokens per second, and ratios to the last side and to the limit.

    Parameters
    ----------
    measurements : list of Measurement
        The last is the baseline.
    limit_seconds : float
        The least time on this machine.
    limit_rate : float
        The most tokens per second.
    """
    baseline = measurements[-1]
    rows = [["side", "seconds: median (range)", "output tok/s", "of limit", "peak GB"]]
    alone = len(measurements) == 1
    if not alone:
        rows[0].insert(3, f"vs {baseline.label}")
    for measurement in measurements:
        seconds = measurement.median("seconds")
        row = [
            measurement.label,
            spread(measurement, "seconds"),
            f"{measurement.median('output_tokens_per_second'):.1f}",
            f"{limit_seconds / seconds:.0%}",
            spread(measurement, "peak_bytes", scale=1e-9),
        ]
        if not alone:
            row.insert(3, f"{baseline.median('seconds') / seconds:.2f}x")
        rows.append(row)
    last = ["limit", f"{limit_seconds:.2f}", f"{limit_rate:.1f}", "100%", ""]
    if not alone:
        last.insert(3, "")
    rows.append(last)
    return table(rows)


_LATENCY = (
    ("first_token_seconds", "first token, ms", 1, 1e3),
    ("decode_tokens_per_second", "decode tok/s", 1, 1.0),
    ("seconds", "all, s", 2, 1.0),
    ("forward_ms_per_step", "model, ms/step", 3, 1.0),
    ("overhead_ms_per_step", "engine, ms/step", 3, 1.0),
    ("peak_bytes", "peak GB", 2, 1e-9),
)


def latency_table(
    measurements: list[Measurement],
    limit_seconds: float,
    limit_first_token_seconds: float,
    limit_decode_rate: float,
) -> str:
    """Return each side's time to the first token, its rate after that, and what else it told.

    Parameters
    ----------
    measurements : list of Measurement
    limit_seconds, limit_first_token_seconds : float
        The least times on this machine.
    limit_decode_rate : float
        The most tokens per second after the first.
    """
    rows = [["side", *(label for _, label, _, _ in _LATENCY)]]
    rows[0].insert(3, "of limit")
    for measurement in measurements:
        row = [spread(measurement, name, digits, scale) for name, _, digits, scale in _LATENCY]
        told = "decode_tokens_per_second" in measurement.runs
        share = measurement.median("decode_tokens_per_second") / limit_decode_rate if told else 0
        row.insert(2, f"{share:.0%}" if told else "-")
        rows.append([measurement.label, *row])
    first, rate = f"{1e3 * limit_first_token_seconds:.1f}", f"{limit_decode_rate:.1f}"
    rows.append(["limit", first, rate, "100%", f"{limit_seconds:.2f}", "", "", ""])
    return table(rows)
