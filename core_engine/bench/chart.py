"""Chart: the sides' speeds as bars, with a line at the hardware's limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTALL = 'pip install "quire[bench]"'
"""What brings the library that draws."""

_COLOURS = {"quire": "#1f6f8b"}
_OTHERS = "#a9b4bc"
_LIMIT = "#c0392b"


@dataclass(frozen=True, slots=True)
class Bar:
    """A side's speed.

    Attributes
    ----------
    label : str
    side : str
        quire's own sides have a colour of their own.
    rates : list of float
        Of every run, in tokens per second; their median is drawn, with their range.
    """

    label: str
    side: str
    rates: list[float]


def why_not(path: Path) -> str | None:
    """Return why no chart can be drawn into a file, or None if one can."""
    if path.suffix.lower() != ".png":
        return f"{path}: a chart is a .png file"
    if find_spec("matplotlib") is None:
        return f"{path}: drawing needs matplotlib: {INSTALL}"
    return None


def draw(path: Path, title: str, axis: str, bars: Sequence[Bar], limit: float) -> None:
    """Draw bars into a PNG file.

    Parameters
    ----------
    path : Path
    title, axis : str
        Over the chart, and beside its values.
    bars : sequence of Bar
        From left to right.
    limit : float
        Where the line is, in tokens per second.
    """
    from statistics import median
    from textwrap import fill

    from matplotlib.figure import Figure  # not pyplot: no window, and no state to share

    figure = Figure(figsize=(max(5.0, 1.6 + 1.3 * len(bars)), 4.2), layout="constrained")
    axes = figure.subplots()
    middles = [median(bar.rates) for bar in bars]
    ranges = [
        [middle - min(bar.rates) for middle, bar in zip(middles, bars, strict=True)],
        [max(bar.rates) - middle for middle, bar in zip(middles, bars, strict=True)],
    ]
    places = range(len(bars))
    colours = [_COLOURS.get(bar.side, _OTHERS) for bar in bars]
    axes.bar(places, middles, 0.62, color=colours, yerr=ranges, ecolor="#333333", capsize=4)
    top = max([limit, *(max(bar.rates) for bar in bars)])
    for place, bar, middle in zip(places, bars, middles, strict=True):
        above = max(bar.rates) + 0.015 * top
        axes.text(place, above, f"{middle:.3g}" if middle < 10 else f"{middle:,.0f}",
                  ha="center", va="bottom", fontsize=10)  # fmt: skip
    axes.axhline(limit, color=_LIMIT, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"limit {limit:.3g}" if limit < 10 else f"limit {limit:,.0f}",
        (1.0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color=_LIMIT,
        fontsize=10,
    )
    axes.set_ylim(0, 1.12 * top)
    axes.set_xticks(list(places), [fill(bar.label, 16) for bar in bars])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(axis)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
