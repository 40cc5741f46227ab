"""Cut: which numbers of a parameter are here, where a model is split among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """Consecutive rows of a tensor of a checkpoint, and where they go."""

    here: int
    there: int
    num_rows: int


@dataclass(frozen=True)
class Cut:
    """Some rows of each part of a parameter, and some of its columns.

    Attributes
    ----------
    shape : tuple of int
        Of the whole parameter, rows first.
    parts : mapping of str to int
        Name -> number of rows of each part of the whole, in order; empty: it is of one.
    groups : int
        How many groups of heads a fused ``query, key, value`` has as a whole.
    rows : tuple of range, or None
        Of each part, in order, the rows that are here, counted from the part's first; None: all.
    columns : range or None
        Those that are here; None: all.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, int]
    groups: int = 1
    rows: tuple[range, ...] | None = None
    columns: range | None = None

    @property
    def is_whole(self) -> bool:
        """Whether everything is here."""
        return self.rows is None and self.columns is None

    @property
    def own_parts(self) -> dict[str, int]:
        """Name -> number of rows of each part that are here; empty: it is of one."""
        return {name: len(own) for name, own in zip(self.parts, self._rows(), strict=False)}

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of what is here."""
        num_rows = sum(map(len, self._rows()))
        rest = self.shape[1:] if self.columns is None else (len(self.columns),)
        return (num_rows, *rest)

    def part_shape(self, part: str) -> tuple[int, ...]:
        """Shape of a part as a whole; ``""`` is all of them."""
        return (self.parts[part] if part else self.shape[0], *self.shape[1:])

    def _rows(self) -> tuple[range, ...]:
        if self.rows is not None:
            return self.rows
        return tuple(range(size) for size in self.parts.values()) or (range(self.shape[0]),)

    def runs(self, part: str, *, grouped: bool = False) -> Iterator[Run]:
        """Say which rows of a checkpoint's tensor are here.

        Parameters
        ----------
        part
            That the tensor is; ``""``: all of them, one after the other.
        grouped
            Whether the rows lie group by group, see `quire.models.weights.Weights.fill`.
        """
        here = there = 0
        sizes = self.parts or {"": self.shape[0]}
        for (name, size), own in zip(sizes.items(), self._rows(), strict=True):
            if part and name != part:
                continue
            if grouped:
                for run in self._runs_of_groups(own, size // self.groups, there // self.groups):
                    yield run._replace(here=here + run.here)
            else:
                yield Run(here, there + own.start, len(own))
            here += len(own)
            there += size

    def _runs_of_groups(self, own: range, per_group: int, in_group: int) -> Iterator[Run]:
        first = own.start
        while first < own.stop:
            group, row = divmod(first, per_group)
            end = min((group + 1) * per_group, own.stop)
            there = group * (self.shape[0] // self.groups) + in_group + row
            yield Run(first - own.start, there, end - first)
            first = end

    def index(self, part: str) -> torch.Tensor:
        """Return the rows of a part, ``""`` for all of them, that are here."""
        return torch.cat(
            [torch.arange(run.there, run.there + run.num_rows) for run in self.runs(part)]
        )
