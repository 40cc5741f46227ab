"""Serving: what the timings of requests amount to, and how many were as fast as asked for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from quire.bench.contest import Measurement
from quire.bench.load import Timing
from quire.bench.masks import percentile
from quire.bench.report import spread, table

LIMITS = ("ttft", "tpot", "itl", "e2e")
"""What a request can be held to: see :func:`parse_goodput`."""


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Read limits, such as ``ttft:500``, in milliseconds; several may be in one text.

    ``ttft`` is the time to the first token, ``tpot`` the mean time of a token after it, ``itl`` the
    99th percentile of the request's pauses between tokens, ``e2e`` the time to the end.

    Raises
    ------
    ValueError
        Not a limit, or one given twice.
    """
    limits: dict[str, float] = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, colon, number = text.partition(":")
        if not colon or name not in LIMITS or name in limits:
            raise ValueError(f"{text!r}: one each of {', '.join(LIMITS)}, as ttft:500")
        try:
            limits[name] = float(number)
        except ValueError:
            raise ValueError(f"{text!r}: milliseconds, as ttft:500") from None
    return limits


def is_good(timing: Timing, limits: Mapping[str, float]) -> bool:
    """Whether a request keeps within all limits."""
    values = {
        "ttft": timing.first_token,
        "tpot": timing.per_token,
        "itl": percentile(timing.gaps, 99) if timing.gaps else 0.0,
        "e2e": timing.whole,
    }
    return all(1e3 * values[name] <= most for name, most in limits.items())


def figures_of(timings: Sequence[Timing], limits: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of one run.

    Parameters
    ----------
    timings : sequence of Timing
    limits : mapping
        Of :func:`parse_goodput`; without any there is no goodput.
    """
    seconds = max(t.ended for t in timings) - min(t.sent for t in timings)
    figures = {
        "seconds": seconds,
        "output_tokens_per_second": sum(t.num_tokens for t in timings) / seconds,
        "requests_per_second": len(timings) / seconds,
    }
    values = {
        "first_token": [t.first_token for t in timings],
        "gap": [gap for t in timings for gap in t.gaps],
        "per_token": [t.per_token for t in timings if t.num_tokens > 1],
        "whole": [t.whole for t in timings],
    }
    for name, each in values.items():
        if each:
            figures[f"{name}_seconds"] = statistics.fmean(each)
            figures[f"{name}_seconds_p50"] = percentile(each, 50)
            figures[f"{name}_seconds_p99"] = percentile(each, 99)
    if limits:
        good = sum(is_good(t, limits) for t in timings)
        figures["good_share"] = good / len(timings)
        figures["good_requests_per_second"] = good / seconds
    return figures


def add_comparison(served: Measurement, offline: Measurement, num_tokens: Sequence[int]) -> None:
    """Derive, run by run, what serving costs beside the engine alone on the same requests.

    Parameters
    ----------
    served, offline : Measurement
        Of the same requests in each run.
    num_tokens : sequence of int
        Generated in each.
    """
    pairs = list(zip(served.runs["seconds"], offline.runs["seconds"], strict=True))
    served.runs["of_offline"] = [alone / over for over, alone in pairs]
    served.runs["overhead_ms_per_token"] = [
        1e3 * (over - alone) / count for (over, alone), count in zip(pairs, num_tokens, strict=True)
    ]


_ROWS = (
    ("seconds", "all, s", 2, 1.0),
    ("output_tokens_per_second", "output tok/s", 1, 1.0),
    ("requests_per_second", "requests/s", 2, 1.0),
    ("first_token_seconds", "first token, ms: mean", 1, 1e3),
    ("first_token_seconds_p50", "p50", 1, 1e3),
    ("first_token_seconds_p99", "p99", 1, 1e3),
    ("gap_seconds", "between tokens, ms: mean", 2, 1e3),
    ("gap_seconds_p50", "p50", 2, 1e3),
    ("gap_seconds_p99", "p99", 2, 1e3),
    ("per_token_seconds_p50", "a request's mean, ms: p50", 2, 1e3),
    ("per_token_seconds_p99", "p99", 2, 1e3),
    ("whole_seconds_p50", "whole request, ms: p50", 1, 1e3),
    ("whole_seconds_p99", "p99", 1, 1e3),
    ("good_share", "within the limits, %", 1, 1e2),
    ("good_requests_per_second", "goodput, requests/s", 2, 1.0),
    ("of_offline", "throughput, of offline", 3, 1.0),
    ("overhead_ms_per_token", "over offline, ms/token", 4, 1.0),
)


def serving_table(measurements: Sequence[Measurement]) -> str:
    """Return a line for each figure that somebody has, and a column for each side."""
    rows = [["median (range) of the runs", *(each.label for each in measurements)]]
    for name, label, digits, scale in _ROWS:
        if any(name in each.runs for each in measurements):
            rows.append([label, *(spread(each, name, digits, scale) for each in measurements)])
    return table(rows)
