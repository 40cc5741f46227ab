"""SequenceGroup: sequences of like shape, whose attention is one padded batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]

_QUERIES_PER_TILE = 256
"""Query tokens computed at once: few enough that the keys after them are worth skipping."""

_KEPT_PAIRS = 1 << 22
"""(Query token, key) pairs of a group up to which its masks are kept from layer to layer."""


@dataclass(slots=True, eq=False)
class Tile:
    """A range of a group's queries, and the range of keys that any of them can see.

    `is_whole` says whether these are all there are.
    """

    queries: slice
    keys: slice
    is_whole: bool
    mask: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """Sequences of like shape, computed as one padded batch.

    Attributes
    ----------
    num_seqs, max_query_len, max_kv_len : int
    tokens : Tensor[num_seqs * max_query_len], int64, or slice
        The step's tokens that are the group's queries; a sequence's last token stands in for
        those it lacks. A slice where they follow one another and none is lacking.
    slots : Tensor[num_seqs * max_kv_len], int64
        The cache slots of the group's keys, 0 where a sequence has no more.
    query_lens, contexts : ndarray[num_seqs]
        Tokens of each sequence in this step, and gathered keys before the first of them.
    window : int or None
        How many keys a token sees, itself included, where that is fewer than there are.
    is_causal : bool
        Whether token ``i`` of every sequence sees exactly the gathered keys 0 to ``i``.
    sees_all : bool
        Whether every token sees every gathered key.
    """

    num_seqs: int
    max_query_len: int
    max_kv_len: int
    tokens: torch.Tensor | slice
    slots: torch.Tensor
    query_lens: Integers
    contexts: Integers
    window: int | None
    is_causal: bool
    sees_all: bool
    _tiles: dict[int, list[Tile]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Queries, those included that stand in for lacking ones."""
        return self.num_seqs * self.max_query_len

    def tiles(self, max_pairs: int) -> list[Tile]:
        """Cut the group into tiles of at most `max_pairs` (query token, key) pairs.

        A tile holds one query token of each sequence at least.
        """
        tiles = self._tiles.get(max_pairs)
        if tiles is None:
            fitting = max_pairs // (self.num_seqs * self.max_kv_len)
            step = max(1, min(fitting, _QUERIES_PER_TILE))
            starts = range(0, self.max_query_len, step)
            tiles = [self._tile(start, min(start + step, self.max_query_len)) for start in starts]
            self._tiles[max_pairs] = tiles
        return tiles

    def _tile(self, start: int, stop: int) -> Tile:
        last = int((self.contexts + np.minimum(self.query_lens, stop)).max())
        first = 0
        if self.window is not None:
            steps = np.minimum(self.query_lens - 1, start)
            first = max(0, int((self.contexts + steps).min()) + 1 - self.window)
        is_whole = (start, stop) == (0, self.max_query_len)
        is_whole = is_whole and (first, last) == (0, self.max_kv_len)
        return Tile(slice(start, stop), slice(first, last), is_whole)

    def mask(self, tile: Tile, dtype: torch.dtype) -> torch.Tensor | None:
        """Return 0 where a query sees a key and -inf elsewhere; None if nothing is hidden.

        Returns
        -------
        Tensor[num_seqs, 1, num_queries, num_keys] or None
        """
        if self.sees_all:
            return None
        if tile.mask is not None and tile.mask.dtype is dtype:
            return tile.mask
        distance = self._distance(tile)
        mask = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
        mask.masked_fill_(self._hidden(distance), -torch.inf)
        if self.num_seqs * self.max_query_len * self.max_kv_len <= _KEPT_PAIRS:
            tile.mask = mask
        return mask

    def alibi_bias(self, tile: Tile, dtype: torch.dtype, slopes: torch.Tensor) -> torch.Tensor:
        """Return each head's slope times the distance, and -inf where a key is hidden.

        Returns
        -------
        Tensor[num_seqs, num_heads, num_queries, num_keys]
        """
        distance = self._distance(tile)
        bias = slopes.float().view(1, -1, 1, 1) * distance
        if not self.sees_all:
            bias.masked_fill_(self._hidden(distance), -torch.inf)
        return bias.to(dtype)

    def _distance(self, tile: Tile) -> torch.Tensor:
        """Return key position - query position, `[num_seqs, 1, num_queries, num_keys]`, int32.

        A query that stands in for one that a sequence lacks has the position of its last one.
        """
        device = self.slots.device
        steps = np.arange(tile.queries.start, tile.queries.stop)
        positions = self.contexts[:, None] + np.minimum(steps, self.query_lens[:, None] - 1)
        query_positions = torch.from_numpy(positions.astype(np.int32)).to(device)
        keys = torch.arange(tile.keys.start, tile.keys.stop, dtype=torch.int32, device=device)
        return (keys - query_positions[:, :, None]).unsqueeze(1)

    def _hidden(self, distance: torch.Tensor) -> torch.Tensor:
        hidden = distance > 0
        return hidden if self.window is None else hidden | (distance <= -self.window)
