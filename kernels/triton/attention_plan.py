"""AttentionPlan and DecodePlan: what the layers of a step share, on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from quire.kernels.triton.attention_tiles import Tiles, choose_tiles, processors_of
from quire.kernels.triton.attention_work import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Integers,
    Work,
    share_out,
    tile_queries,
)

_ALIGNMENT = 16
"""Numbers: pointers of one alignment are compiled for once."""


class LayerKind(NamedTuple):
    """What of a layer decides how its attention is cut up.

    Attributes
    ----------
    num_kv_heads, shared_by, head_dim : int
        `shared_by` is how many query heads read one KV head.
    itemsize : int
        Bytes of a number of its queries.
    is_coded : bool
        Whether its caches hold codes.
    window : int or None
    """

    num_kv_heads: int
    shared_by: int
    head_dim: int
    itemsize: int
    is_coded: bool
    window: int | None

    @property
    def width(self) -> int:
        """The size of a head, rounded up to a power of two that a product of tiles can have."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    def tiles(self, device: torch.device) -> tuple[Tiles, ...]:
        """Return the sizes of tiles, the smallest first; each has room for all heads of a token.

        The largest is kept in any case: what does not fit in there is cut into `shares`.
        """
        memory = processors_of(device).shared_memory
        sizes = choose_tiles(self.width, self.itemsize, self.is_coded, memory)
        return tuple(tiles for tiles in sizes[:-1] if tiles.rows >= self.shared_by) + sizes[-1:]


class Launch(NamedTuple):
    """One launch of `attend`, and of `merge_parts` after it.

    Attributes
    ----------
    tiles : Tiles
    heads, shares : int
        Query heads in a tile, and in how many such tiles those of one KV head are cut.
    kept_rows : int
        Rows of a tile at most.
    items : Tensor[7, num_items], int32
    merges : Tensor[4, num_merges], int32
    num_parts : int
        At most.
    """

    tiles: Tiles
    heads: int
    shares: int
    kept_rows: int
    items: torch.Tensor
    merges: torch.Tensor
    num_parts: int


def upload(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bring integers to a device as int32, without waiting for it."""
    if device.type == "cpu":
        return torch.from_numpy(numbers.astype(np.int32))
    return staged(numbers).to(device, non_blocking=True)


def staged(numbers: np.ndarray) -> torch.Tensor:
    """Return integers as int32 in memory that devices read by themselves.

    It is torch's own, which is not handed out again before a copy out of it is done.
    """
    stage = torch.empty(numbers.shape, dtype=torch.int32, pin_memory=True)
    stage.numpy()[...] = numbers
    return stage


def _heads_of(kind: LayerKind, tiles: Tiles) -> tuple[int, int]:
    """Return how many heads a tile has, and in how many such those of a KV head are cut."""
    shares = -(-kind.shared_by // tiles.rows)
    return -(-kind.shared_by // shares), shares


def _num_ranges(kind: LayerKind, tiles: Tiles, shares: int, device: torch.device) -> int:
    programs = tiles.programs * processors_of(device).number
    return max(1, programs // (kind.num_kv_heads * shares))


class AttentionPlan:
    """What the layers of one step share. Used by one thread at a time.

    Parameters
    ----------
    starts, query_lens, seq_lens : ndarray[num_seqs]
    block_tables : Tensor[num_seqs, max_blocks], int32
        On the device.
    block_size : int
    """

    __slots__ = (
        "_launches",
        "_longest",
        "_query_lens",
        "_seq_lens",
        "_starts",
        "block_size",
        "block_tables",
    )

    def __init__(
        self,
        starts: Integers,
        query_lens: Integers,
        seq_lens: Integers,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> None:
        self._starts = starts
        self._query_lens = query_lens
        self._seq_lens = seq_lens
        self._longest = int(seq_lens.max(initial=0))
        self._launches: dict[LayerKind, list[Launch]] = {}
        self.block_tables = block_tables
        self.block_size = block_size

    def seen_through(self, window: int | None) -> int | None:
        """Return the window of a layer; None if nothing is hidden by it."""
        return None if window is None or window >= self._longest else window

    def launches(self, kind: LayerKind) -> list[Launch]:
        """Return how attention of such layers is cut up."""
        launches = self._launches.get(kind)
        if launches is None:
            launches = self._launches[kind] = self._lay_out(kind)
        return launches

    def _lay_out(self, kind: LayerKind) -> list[Launch]:
        """Sort sequences by the smallest tile that has room for all of their rows."""
        device = self.block_tables.device
        sizes = kind.tiles(device)
        rows = self._query_lens * kind.shared_by
        classes = np.searchsorted([tiles.rows for tiles in sizes[:-1]], rows)
        works: list[tuple[Tiles, int, int, int, Work]] = []
        for index, tiles in enumerate(sizes):
            members = np.flatnonzero(classes == index)
            if not len(members):
                continue
            heads, shares = _heads_of(kind, tiles)
            tokens = tiles.rows // heads
            queries = tile_queries(members, self._starts, self._query_lens, self._seq_lens, tokens)
            num_ranges = _num_ranges(kind, tiles, shares, device)
            work = share_out(queries, kind.window, num_ranges, tiles.least_share)
            # What is compiled must not depend on more of the step than this.
            kept = heads if self._query_lens[members].max() == 1 else heads * tokens
            works.append((tiles, heads, shares, kept, work))
        # All goes over in one copy.
        pieces = [piece for *_, work in works for piece in (work.items, work.merges)]
        sizes_of = [-(-piece.size // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
        numbers = np.zeros(sum(sizes_of), dtype=np.int32)
        places = np.cumsum([0, *sizes_of]).tolist()
        for piece, place in zip(pieces, places, strict=False):
            numbers[place : place + piece.size] = piece.reshape(-1)
        there = upload(numbers, device)
        views = [
            there[place : place + piece.size].view(piece.shape)
            for piece, place in zip(pieces, places, strict=False)
        ]
        return [
            Launch(tiles, heads, shares, kept, items, merges, work.num_parts)
            for (tiles, heads, shares, kept, work), items, merges in zip(
                works, views[::2], views[1::2], strict=True
            )
        ]


class DecodePlan:
    """A plan of tensors that stay where they are: for steps of one token for each sequence.

    Each kind of layer must have been computed once before a step is recorded: it gets its tensors
    then.

    Parameters
    ----------
    num_seqs, max_blocks, block_size : int
    device : torch.device
    """

    __slots__ = ("_device", "_launches", "_seq_lens", "block_size", "block_tables", "num_seqs")

    def __init__(self, num_seqs: int, max_blocks: int, block_size: int, device: torch.device):
        self._device = device
        self._launches: dict[LayerKind, tuple[Launch, torch.Tensor]] = {}
        self._seq_lens = np.zeros(num_seqs, dtype=np.int64)
        self.num_seqs = num_seqs
        self.block_size = block_size
        self.block_tables = torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=device)

    def seen_through(self, window: int | None) -> int | None:
        """Return the window of a layer; None if no sequence can be longer."""
        longest = self.block_tables.shape[1] * self.block_size
        return None if window is None or window >= longest else window

    def launches(self, kind: LayerKind) -> list[Launch]:
        """Return how attention of such layers is cut up."""
        laid_out = self._launches.get(kind)
        if laid_out is None:
            laid_out = self._launches[kind] = self._lay_out(kind)
            self._fill(kind, *laid_out)
        return [laid_out[0]]

    def fill(self, seq_lens: torch.Tensor, block_tables: torch.Tensor) -> None:
        """See `quire.kernels.interface.Backend.fill_decode_plan`."""
        num_seqs, num_blocks = block_tables.shape
        self._seq_lens[:num_seqs] = seq_lens.numpy()
        self._seq_lens[num_seqs:] = 0
        self.block_tables[:num_seqs, :num_blocks].copy_(block_tables, non_blocking=True)
        for kind, laid_out in self._launches.items():
            self._fill(kind, *laid_out)

    def _lay_out(self, kind: LayerKind) -> tuple[Launch, torch.Tensor]:
        """Return the launch, and the one tensor that its items and merges lie in."""
        tiles = kind.tiles(self._device)[0]
        heads, shares = _heads_of(kind, tiles)
        num_items = self.num_seqs + _num_ranges(kind, tiles, shares, self._device)
        size = ITEM_FIELDS * num_items
        place = -(-size // _ALIGNMENT) * _ALIGNMENT
        numbers = torch.zeros(
            place + MERGE_FIELDS * self.num_seqs, dtype=torch.int32, device=self._device
        )
        items = numbers[:size].view(ITEM_FIELDS, num_items)
        merges = numbers[place:].view(MERGE_FIELDS, self.num_seqs)
        return Launch(tiles, heads, shares, heads, items, merges, num_items), numbers

    def _fill(self, kind: LayerKind, launch: Launch, there: torch.Tensor) -> None:
        num_seqs, num_items = self.num_seqs, launch.items.shape[1]
        rows = np.arange(num_seqs)
        ones = np.ones(num_seqs, dtype=np.int64)
        queries = tile_queries(rows, rows, ones, self._seq_lens, 1)
        work = share_out(queries, kind.window, num_items - num_seqs, launch.tiles.least_share)
        numbers = np.zeros(there.shape, dtype=np.int32)
        items = numbers[: launch.items.numel()].reshape(launch.items.shape)
        merges = numbers[-launch.merges.numel() :].reshape(launch.merges.shape)
        items[:, : work.items.shape[1]] = work.items
        merges[:, : work.merges.shape[1]] = work.merges
        if self._device.type == "cpu":
            there.copy_(torch.from_numpy(numbers))
        else:
            there.copy_(staged(numbers), non_blocking=True)


def plan_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> AttentionPlan:
    """See `quire.kernels.interface.Backend.plan_attention`."""
    starts = query_start_loc.numpy().astype(np.int64)
    return AttentionPlan(
        starts[:-1],
        np.diff(starts),
        seq_lens.numpy().astype(np.int64),
        block_tables,
        block_size,
    )
