"""LoRA on a GPU: tables of where adapters' matrices are, and the launches that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from quire.kernels.lora import AdapterSlots, Expand, LoraRows, Shrink
from quire.kernels.triton.lora_products import expand_rows, shrink_rows, sum_parts

_OUTPUTS = 128
"""Outputs of a program of `expand_rows`."""

_LEAST_INPUTS, _MOST_PARTS = 512, 8
"""How the inputs of `shrink_rows` are divided: by their number alone, so that a row is computed
alike in any company."""

_MATRIX_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class _Placed(NamedTuple):
    """What a table has of one adapter, and the tensors whose addresses are in it."""

    rows: npt.NDArray[np.int64]
    tensors: list[torch.Tensor]


class _Table:
    """The adapters of one projection for the kernels; made anew when an entry has changed.

    Attributes
    ----------
    entries : list
        What it was made of.
    dtype : torch.dtype
        Of all matrices.
    """

    def __init__(self, place: Callable[[Any, torch.dtype], _Placed]) -> None:
        self.entries: list[Any] = []
        self.dtype = torch.float32
        self._place = place
        self._placed: list[_Placed] = []
        self._tensors: list[torch.Tensor] = []

    def follow(self, adapters: Sequence[Any], device: torch.device) -> None:
        """See that it is of these adapters."""
        if self.entries == adapters:  # entries are equal to themselves alone
            return
        entries = list(adapters)
        types = {matrix.dtype for each in entries if each is not None for matrix in _matrices(each)}
        dtype = types.pop() if len(types) == 1 else torch.float32
        known = dict(zip(map(id, self.entries), self._placed, strict=True))
        placed = []
        for each in entries:
            old = known.get(id(each)) if dtype is self.dtype else None
            placed.append(old or self._place(each, dtype))
        self.entries, self.dtype, self._placed = entries, dtype, placed
        self._tensors = _uploaded([each.rows for each in placed], device)

    @property
    def blocks(self) -> torch.Tensor:
        """The rows of all adapters, one after the other."""
        return self._tensors[0]

    @property
    def stretches(self) -> torch.Tensor:
        """The first row, and the number of rows, of each."""
        return self._tensors[1]

    def most_blocks(self, places: Sequence[int]) -> int:
        """Return the highest number of rows that one of some adapters has."""
        return max(len(self._placed[place].rows) for place in places)


def lora_shrink(x: torch.Tensor, adapters: Sequence[Shrink | None], rows: LoraRows) -> torch.Tensor:
    """See `quire.kernels.lora_interface.LoraOperations.lora_shrink`."""
    parts = [adapters[place] for place, _ in rows.groups]
    max_rank = max((len(each.scales) for each in parts if each is not None), default=0)
    num_rows, num_inputs = x.shape
    shrunk = torch.empty(num_rows, max_rank, dtype=torch.float32, device=x.device)
    if not shrunk.numel():
        return shrunk
    table = _table(adapters, _place_shrink, x.device)
    inputs = 64 if table.dtype is torch.float32 or x.dtype is not table.dtype else 128
    # At least so many, at most so many parts, and whole blocks.
    per_part = max(_LEAST_INPUTS, -(-num_inputs // _MOST_PARTS))
    per_part = -(-per_part // inputs) * inputs
    num_parts = -(-num_inputs // per_part)
    ranks = 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64
    rank_blocks = -(-max_rank // ranks)
    sums = torch.empty(num_parts, num_rows, max_rank, dtype=torch.float32, device=x.device)
    shrink_rows[(len(rows.tiles), rank_blocks, num_parts)](
        x,
        rows.order,
        rows.tiles,
        table.blocks,
        sums,
        num_rows,
        max_rank,
        num_inputs,
        x.stride(0),
        per_part,
        MATRIX=_MATRIX_TYPES[table.dtype],
        ALIGNED=16 // table.dtype.itemsize,
        PRECISION=precision(),
        ROWS=rows.tile_rows,
        RANKS=ranks,
        INPUTS=inputs,
        num_warps=4,
        num_stages=3,
    )
    sum_parts[(-(-num_rows // 16), rank_blocks)](
        sums,
        rows.slots,
        table.blocks,
        shrunk,
        num_rows,
        max_rank,
        num_parts,
        ROWS=16,
        RANKS=ranks,
        num_warps=2,
    )
    return shrunk


def lora_expand(
    y: torch.Tensor,
    shrunk: torch.Tensor,
    adapters: Sequence[Expand | None],
    rows: LoraRows,
) -> None:
    """See `quire.kernels.lora_interface.LoraOperations.lora_expand`."""
    table = _table(adapters, _place_expand, y.device)
    num_blocks = table.most_blocks([place for place, _ in rows.groups])
    if not num_blocks:
        return
    expand_rows[(len(rows.tiles), num_blocks)](
        y,
        shrunk,
        rows.order,
        rows.tiles,
        table.stretches,
        table.blocks,
        y.stride(0),
        shrunk.stride(0),
        MATRIX=_MATRIX_TYPES[table.dtype],
        ALIGNED=16 // table.dtype.itemsize,
        PRECISION=precision(),
        ROWS=rows.tile_rows,
        OUTPUTS=_OUTPUTS,
        RANKS=16 if shrunk.shape[1] <= 16 else 32,
        num_warps=4,
        num_stages=2,
    )


def precision() -> str:
    """How float32 is multiplied: close to its own precision, on tensor cores where they can."""
    return "ieee" if torch.version.hip else "tf32x3"


def _table(
    adapters: Sequence[Any], place: Callable[[Any, torch.dtype], _Placed], device: torch.device
) -> _Table:
    table = getattr(adapters, "kept", None)
    if not isinstance(table, _Table):
        table = _Table(place)
        if isinstance(adapters, AdapterSlots):
            adapters.kept = table
    table.follow(adapters, device)
    return table


def _matrices(entry: Shrink | Expand) -> list[torch.Tensor]:
    if isinstance(entry, Shrink):
        return [entry.a]
    return [each.b for each in entry.slices]


def _place_shrink(entry: Shrink | None, dtype: torch.dtype) -> _Placed:
    """One row of the table of `shrink_rows`, whatever it is."""
    if entry is None:
        return _Placed(np.zeros((1, 4), np.int64), [])
    a, scales = _aligned(entry.a, dtype), entry.scales.float().contiguous()
    row = [a.data_ptr(), scales.data_ptr(), len(scales), a.stride(0)]
    return _Placed(np.array([row], np.int64), [a, scales])


def _place_expand(entry: Expand | None, dtype: torch.dtype) -> _Placed:
    """Blocks of `expand_rows`, as many as there are outputs to be changed."""
    if entry is None:
        return _Placed(np.zeros((0, 8), np.int64), [])
    tensors = [
        None if each is None else each.float().contiguous() for each in (entry.factor, entry.offset)
    ]
    factor, offset = (0 if each is None else each.data_ptr() for each in tensors)
    kept = [each for each in tensors if each is not None]
    blocks, covered = [], 0
    for each in sorted(entry.slices, key=lambda part: part.first_row):
        num_outputs, rank = each.b.shape
        if not num_outputs:
            continue
        blocks.append(_blocks(covered, each.first_row, 0, 0, None))
        covered = each.first_row + num_outputs
        b = _aligned(each.b, dtype)
        kept.append(b)
        blocks.append(_blocks(each.first_row, covered, each.first_rank, rank, b))
    for num_outputs in {len(each) for each in tensors if each is not None}:
        blocks.append(_blocks(covered, num_outputs, 0, 0, None))
    rows = np.concatenate(blocks) if blocks else np.zeros((0, 8), np.int64)
    rows[:, 6], rows[:, 7] = factor, offset
    if not factor and not offset:  # what gains nothing stays as it is
        rows = rows[rows[:, 3] > 0]
    return _Placed(rows, kept)


def _blocks(
    first: int, end: int, first_rank: int, rank: int, b: torch.Tensor | None
) -> npt.NDArray[np.int64]:
    """Cut some outputs into blocks for `expand_rows`; without ``b`` they have no gain."""
    firsts = np.arange(first, end, _OUTPUTS, dtype=np.int64)
    rows = np.zeros((len(firsts), 8), np.int64)
    rows[:, 0], rows[:, 1] = firsts, np.minimum(firsts + _OUTPUTS, end)
    if b is not None and rank:
        rows[:, 2], rows[:, 3], rows[:, 5] = first_rank, rank, b.stride(0)
        rows[:, 4] = b.data_ptr() + (firsts - first) * b.stride(0) * b.itemsize
    return rows


def _aligned(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix with zeros behind its rows up to multiples of 16 bytes, where they begin.

    It is the given one where that has nothing behind its rows.
    """
    in_row = 16 // dtype.itemsize
    if (
        matrix.dtype is dtype
        and matrix.stride(1) == 1
        and matrix.shape[1] % in_row == 0
        and matrix.stride(0) % in_row == 0
        and matrix.data_ptr() % 16 == 0
    ):
        return matrix
    rows, columns = matrix.shape
    padded = matrix.new_zeros(rows, -(-columns // in_row) * in_row, dtype=dtype)
    padded[:, :columns] = matrix
    return padded[:, :columns]


def _uploaded(rows: list[npt.NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """Return the rows of all adapters, and where each one's are, on a device."""
    counts = np.array([len(each) for each in rows], np.int64)
    stretches = np.stack([np.cumsum(counts) - counts, counts], 1)
    blocks = np.concatenate(rows)
    tensors = []
    for each in (blocks, stretches):
        tensor = torch.from_numpy(each)
        if device.type != "cpu":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        tensors.append(tensor)
    return tensors
