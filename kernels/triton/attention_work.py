"""Work: the tiles of a step, and the ranges of keys that programs take of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quire.kernels.triton.attention_tiles import KEYS_UNIT

Integers = npt.NDArray[np.int64]

ITEM_FIELDS = 7
MERGE_FIELDS = 4


class QueryTiles(NamedTuple):
    """Query tokens that follow one another in a sequence, as many as a program takes.

    Attributes
    ----------
    sequences : ndarray[num_tiles]
        The row of the block table.
    tokens, counts : ndarray[num_tiles]
        The first token in the step, and how many there are.
    ends : ndarray[num_tiles]
        How many keys the first token sees, its own included, if there is no window.
    """

    sequences: Integers
    tokens: Integers
    counts: Integers
    ends: Integers


class Work(NamedTuple):
    """What `attend` and `merge_parts` are told.

    Attributes
    ----------
    items : ndarray[7, num_items], int64
        See `quire.kernels.triton.attention_kernel.attend`.
    merges : ndarray[4, num_merges], int64
        See `quire.kernels.triton.attention_kernel.merge_parts`.
    num_parts : int
    """

    items: Integers
    merges: Integers
    num_parts: int


def tile_queries(
    rows: Integers, starts: Integers, query_lens: Integers, seq_lens: Integers, tokens: int
) -> QueryTiles:
    """Cut the query tokens of some sequences into tiles.

    Parameters
    ----------
    rows : ndarray[num_rows]
        Which sequences.
    starts, query_lens, seq_lens : ndarray[num_seqs]
        Of all sequences: first token in the step, number of tokens there, number of keys.
    tokens : int
        In a tile, at most.
    """
    lens = query_lens[rows]
    counts = -(-lens // tokens)
    owners = np.repeat(np.arange(len(rows)), counts)
    first = (np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]) * tokens
    sequences = rows[owners]
    return QueryTiles(
        sequences,
        starts[sequences] + first,
        np.minimum(tokens, lens[owners] - first),
        (seq_lens - query_lens)[sequences] + first + 1,
    )


def share_out(tiles: QueryTiles, window: int | None, num_ranges: int, least_share: int) -> Work:
    """Cut the keys that tiles see into ranges of about one length, the longest first.

    There are `num_ranges` at most, beside one for each tile; and none is shorter than about
    `least_share` keys but where a tile has no more.

    Parameters
    ----------
    tiles : QueryTiles
    window : int or None
        How many keys a token sees at most.
    num_ranges : int
        At least 1.
    least_share : int
    """
    high = np.where(tiles.ends > 0, tiles.ends + tiles.counts - 1, 0)
    low = np.zeros_like(high) if window is None else np.maximum(tiles.ends - window, 0)
    begin = low // KEYS_UNIT * KEYS_UNIT
    lens = high - begin
    share = max(least_share, -(-int(lens.sum()) // num_ranges))
    numbers = np.maximum((lens + share // 2) // share, 1)
    # Whole units of keys may make do with fewer ranges than that.
    own_share = np.maximum(-(-lens // (numbers * KEYS_UNIT)) * KEYS_UNIT, KEYS_UNIT)
    numbers = np.maximum(-(-lens // own_share), 1)
    owners = np.repeat(np.arange(len(lens)), numbers)
    index = np.arange(len(owners)) - (np.cumsum(numbers) - numbers)[owners]
    lows = begin[owners] + index * own_share[owners]
    highs = np.minimum(lows + own_share[owners], high[owners])
    lows = np.maximum(lows, low[owners])
    is_cut = numbers > 1
    pieces = np.where(is_cut, numbers, 0)
    first_parts = np.cumsum(pieces) - pieces
    parts = np.where(is_cut[owners], first_parts[owners] + index, -1)
    items = np.stack(
        (
            tiles.sequences[owners],
            tiles.tokens[owners],
            tiles.counts[owners],
            tiles.ends[owners],
            lows,
            highs,
            parts,
        )
    )
    order = np.argsort(lows - highs, kind="stable")
    merges = np.stack((tiles.tokens, tiles.counts, first_parts, numbers))[:, is_cut]
    return Work(items[:, order], merges, int(pieces.sum()))
