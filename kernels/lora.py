"""What the operations on LoRA adapters work on: each adapter's matrices, and whose each row is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

_FEW_ROWS = 32
"""An adapter with more rows in a batch than that has them computed in taller tiles."""

Entry = TypeVar("Entry")


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


class AdapterSlots(list[Entry]):
    """The adapters of one projection by place, and what a backend made of them.

    Attributes
    ----------
    kept : object
        The backend's alone, which sees by the entries themselves whether they have changed.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        super().__init__(entries)
        self.kept: Any = None


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
    order : Tensor[num_rows_with_adapters], int64
        These rows, adapter by adapter.
    tiles : Tensor[num_tiles, 3], int32
        ``order`` cut up, so that each tile has rows of one adapter: that adapter's place, where the
        tile begins in ``order``, and how many rows it has.
    tile_rows : int
        The most that a tile has.
    """

    slots: torch.Tensor
    groups: tuple[tuple[int, slice | torch.Tensor], ...]
    order: torch.Tensor
    tiles: torch.Tensor
    tile_rows: int

    @classmethod
    def of(cls, slots: torch.Tensor, device: torch.device) -> LoraRows | None:
        """Sort rows by adapter.

        Parameters
        ----------
        slots : Tensor[num_rows], int32, on the CPU
        device : torch.device
            Of the rows. What is needed there is copied at once, and not waited for.

        Returns
        -------
        LoraRows or None
            None where no row has an adapter.
        """
        places = slots.numpy()
        order = np.argsort(places, kind="stable")
        order = order[np.searchsorted(places[order], 0) :]
        if not len(order):
            return None
        found, firsts, counts = np.unique(places[order], return_index=True, return_counts=True)
        tile_rows = 16 if counts.max() <= _FEW_ROWS else 64
        tiles = [
            (place, begin, min(tile_rows, first + count - begin))
            for place, first, count in zip(found.tolist(), firsts, counts, strict=True)
            for begin in range(first, first + count, tile_rows)
        ]
        on_device = _copied([order, places, np.array(tiles, np.int32)], device)
        groups: list[tuple[int, slice | torch.Tensor]] = []
        for place, first, count in zip(found.tolist(), firsts, counts, strict=True):
            rows = order[first : first + count]
            if rows[-1] - rows[0] + 1 == count:
                groups.append((place, slice(int(rows[0]), int(rows[-1]) + 1)))
            else:
                groups.append((place, on_device[0][first : first + count]))
        return cls(on_device[1], tuple(groups), on_device[0], on_device[2], tile_rows)


def _copied(arrays: list[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to a device, all at once, from memory that it reads while the host goes on."""
    tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays]
    if device.type == "cpu":
        return tensors
    # Each begins where kernels like their arguments to: compiled for one alignment, once.
    sizes = [-(-each.nbytes // 16) * 16 for each in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, each in zip(packed.split_with_sizes(sizes), tensors, strict=True):
        part[: each.nbytes].view(each.dtype).copy_(each.flatten())
    moved = packed.to(device, non_blocking=True).split_with_sizes(sizes)
    return [
        part[: each.nbytes].view(each.dtype).view(each.shape)
        for part, each in zip(moved, tensors, strict=True)
    ]
