"""What the operations on LoRA adapters work on: each adapter's matrices, and whose each row is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, eq=False)
class Shrink:
    """What an adapter shrinks the input of one projection by.

    Attributes
    ----------
    a : Tensor[rank, in_features]
        ``rank`` may be 0.
    scales : Tensor[rank], float32
    """

    a: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ExpandSlice:
    """Some outputs of a projection, and what makes their gain.

    Attributes
    ----------
    first_row : int
        The first output.
    first_rank : int
        The first column that they read of the shrunk input.
    b : Tensor[num_outputs, rank]
    """

    first_row: int
    first_rank: int
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Expand:
    """What an adapter makes of the output of one projection.

    Attributes
    ----------
    slices : tuple of ExpandSlice
        No two have an output in common.
    factor : Tensor[out_features], float32, or None
        Multiplies the output once it has its gain.
    offset : Tensor[out_features], float32, or None
        Added last.
    """

    slices: tuple[ExpandSlice, ...]
    factor: torch.Tensor | None = None
    offset: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoraRows:
    """Which adapter each row of a batch belongs to; worked out once for all projections.

    Attributes
    ----------
    slots : Tensor[num_rows], int32
        The place of the row's adapter in the sequences that operations are given; -1: none.
    groups : tuple of (int, slice or Tensor[num_rows_of_it], int64)
        Each adapter that has rows, in ascending order of place, and its rows: a slice where they
        stand side by side.
    """

    slots: torch.Tensor
    groups: tuple[tuple[int, slice | torch.Tensor], ...]

    @classmethod
    def of(cls, slots: torch.Tensor, device: torch.device) -> LoraRows | None:
        """Sort rows by adapter.

        Parameters
        ----------
        slots : Tensor[num_rows], int32, on the CPU
        device : torch.device
            Of the rows.

        Returns
        -------
        LoraRows or None
            None where no row has an adapter.
        """
        places = slots.numpy()
        groups: list[tuple[int, slice | torch.Tensor]] = []
        for place in np.unique(places).tolist():
            if place < 0:
                continue
            rows = np.flatnonzero(places == place)
            first, end = int(rows[0]), int(rows[-1]) + 1
            if end - first == len(rows):
                groups.append((place, slice(first, end)))
            else:
                groups.append((place, torch.from_numpy(rows).to(device)))
        return cls(slots.to(device), tuple(groups)) if groups else None
