"""The tables of ``quire bench structured``."""

from __future__ import annotations

from statistics import median

from quire.bench.contest import Measurement
from quire.bench.masks import Library
from quire.bench.report import spread, table


def _microseconds(library: Library, percent: float, cases: list[str] | None = None) -> str:
    """Return the median and range of a percentile of masks; a dash where there are none."""
    names = list(library.mask_seconds) if cases is None else cases
    if not names or not all(library.mask_seconds.get(name) for name in names):
        return "-"
    measured = Measurement("", {"mask": library.mask_percentiles(percent, names)})
    return spread(measured, "mask", 1, 1e6)


def masks_table(libraries: list[Library]) -> str:
    """Return what each library's masks and compilations cost."""
    present = [library for library in libraries if library.why_missing is None]
    walked = {case for library in present for case in library.mask_seconds}
    common = sorted(
        case for case in walked if all(case in library.mask_seconds for library in present)
    )
    rows = [
        [
            "library",
            "ready, s",
            "compiled",
            "compile p50, ms",
            "p95, ms",
            "mask p50, us: median (range)",
            "p99, us",
            f"p50, us, of {len(common)} that all take",
            "p99, us",
            "valid texts refused",
        ]
    ]
    for library in libraries:
        if library.why_missing is not None:
            rows.append([library.name, library.why_missing, *[""] * 8])
            continue
        taken, refused = len(library.compile_seconds), len(library.refused)
        compiling = [
            f"{1e3 * library.compile_percentile(percent):.1f}" if taken else "-"
            for percent in (50, 95)
        ]
        rows.append(
            [
                f"{library.name} {library.version}",
                f"{library.ready_seconds:.1f}",
                f"{taken} of {taken + refused}",
                *compiling,
                _microseconds(library, 50),
                _microseconds(library, 99),
                _microseconds(library, 50, common),
                _microseconds(library, 99, common),
                f"{library.num_refused} of {library.num_texts}",
            ]
        )
    return table(rows)


def cases_table(libraries: list[Library]) -> str:
    """Return the masks' cost by constraint, medians of the runs."""
    present = [library for library in libraries if library.why_missing is None]
    names = dict.fromkeys(case for library in present for case in library.mask_seconds)
    rows = [["constraint", *(f"{library.name}: p50 / p99, us" for library in present)]]
    for name in names:
        row = [name]
        for library in present:
            if name in library.mask_seconds:
                both = [1e6 * median(library.mask_percentiles(n, [name])) for n in (50, 99)]
                row.append(" / ".join(f"{value:.1f}" for value in both))
            else:
                row.append("refused")
        rows.append(row)
    return table(rows)


def rates_table(measurements: list[Measurement], *, characters: bool = False) -> str:
    """Return seconds and tokens per second, and the ratios to the first side's."""
    first = measurements[0]
    rows = [["side", "seconds: median (range)", "steps", "tokens", "tok/s", f"vs {first.label}"]]
    if characters:
        rows[0] += ["characters/s", f"vs {first.label}"]
    for measurement in measurements:
        row = [
            measurement.label,
            spread(measurement, "seconds"),
            f"{measurement.median('steps'):.0f}",
            f"{measurement.median('tokens'):.0f}",
        ]
        names = ["tokens_per_second"] + ["characters_per_second"] * characters
        for name in names:
            row.append(spread(measurement, name, 1))
            # Runs of the same turn: a busy minute hits both.
            pairs = zip(measurement.runs[name], first.runs[name], strict=True)
            ratios = Measurement("", {"ratio": [value / of for value, of in pairs]})
            row.append(spread(ratios, "ratio", 3))
        rows.append(row)
    return table(rows)


def steps_table(kinds: dict[str, list[Measurement]]) -> str:
    """Return the steps for the records of each kind without and with, and for all."""
    [(without, with_), *_] = kinds.values()
    rows = [["keys of", "records", "tokens", without.label, with_.label, "fewer steps"]]
    every = [Measurement(each.label) for each in (without, with_)]
    for kind, sides in [*kinds.items(), ("all", every)]:
        for side, total in zip(sides, every, strict=True):
            if side is not total:
                for name in ("steps", "tokens"):
                    total.runs.setdefault(name, []).extend(side.runs[name])
        before, after = (sum(side.runs["steps"]) for side in sides)
        rows.append(
            [
                kind,
                str(len(sides[0].runs["steps"])),
                f"{sum(sides[0].runs['tokens']):.0f}",
                f"{before:.0f}",
                f"{after:.0f}",
                f"{1 - after / before:.1%}",
            ]
        )
    return table(rows)
