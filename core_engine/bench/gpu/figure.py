"""Figure: one thing that was measured, what it is a share of, and whether that is enough."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A line of the table.

    Attributes
    ----------
    part, name : str
        Which part measured what.
    values : list of float
        Of every run; the median is what counts. None: the note says why.
    unit : str
    digits : int
        After the point.
    ratio : float or None
        Of the median to something.
    ratio_to : str
        What it is to, such as ``"of copy"``; ``"x static"`` for what is no share.
    goal : float or None
        What the ratio is to reach or, with `limit`, the median is to stay below.
    limit : bool
    note : str
        What was different, left out or cut.
    """

    part: str
    name: str
    values: list[float]
    unit: str
    digits: int = 1
    ratio: float | None = None
    ratio_to: str = ""
    goal: float | None = None
    limit: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None: there is none."""
        if self.goal is None:
            return None
        if self.limit:
            return self.median <= self.goal
        return self.ratio is not None and self.ratio >= self.goal

    def cells(self) -> list[str]:
        """Return part, name, value, ratio, goal and note, as a table has them."""
        value = f"{self.median:,.{self.digits}f} {self.unit}" if self.values else "-"
        if len(self.values) > 1:
            low, high = min(self.values), max(self.values)
            value += f" ({low:,.{self.digits}f}-{high:,.{self.digits}f})"
        ratio = ""
        if self.ratio is not None:
            ratio = self._ratio(self.ratio)
        goal = ""
        if self.goal is not None:
            wanted = (
                f"{self.goal:g} {self.unit}" if self.limit else self._ratio(self.goal, bare=True)
            )
            goal = f"{wanted}: {'reached' if self.reached else 'NOT REACHED'}"
        return [self.part, self.name, value, ratio, goal, self.note]

    def _ratio(self, ratio: float, *, bare: bool = False) -> str:
        if self.ratio_to.startswith("x "):
            return f"{ratio:.2g}x" if bare else f"{ratio:.2f}{self.ratio_to}"
        return f"{ratio:.0%}" if bare else f"{ratio:.0%} {self.ratio_to}"

    def to_message(self) -> dict[str, Any]:
        """Return the fields by their names."""
        return asdict(self)


HEADINGS = ["part", "what", "median (range)", "share", "goal", "note"]
"""Of the columns that `Figure.cells` fills."""
