"""Tiles: what one program of attention computes, and how many programs there should be."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

KEYS_UNIT = 128
"""Keys are shared out in multiples of so many, which all sizes of tiles divide."""


class Tiles(NamedTuple):
    """What one program computes, and how keys are shared out among programs.

    Attributes
    ----------
    rows : int
        Rows of a tile: the heads that share a KV head, of some query tokens. A power of two.
    keys : int
        Keys taken in at once. A power of two.
    num_warps, num_stages : int
    programs : int
        How many programs a processor should get, so that all are busy to the end.
    least_share : int
        Keys below which a program is not worth its start. A multiple of `KEYS_UNIT`.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int
    least_share: int


@cache
def choose_tiles(
    width: int, itemsize: int, is_coded: bool, shared_memory: int
) -> tuple[Tiles, ...]:
    """Return the sizes of tiles for heads of so many numbers, the smallest first.

    Few rows are bound by the reading of keys: there, keys are shared out among many programs. Many
    rows are bound by tensor cores, which float32 has none of.

    The numbers of a block are read before its keys: it takes two stages to be one tile of keys
    ahead, and four to be two.

    Parameters
    ----------
    width : int
        The size of a head, rounded up to a power of two.
    itemsize : int
        Bytes of a number as it is computed with.
    is_coded : bool
        Whether keys and values are codes, which lie at whole fours of bytes alone: that takes
        registers for four times as many places.
    shared_memory : int
        Bytes that a program may have.
    """
    if itemsize == 4:
        keys = 32 if width <= 128 else 16
        sizes = [Tiles(16, keys, 8, 2, 16, 128), Tiles(32, keys, 8, 2, 4, 512)]
    else:
        few = 32 if is_coded or width > 128 else 64
        sizes = [
            Tiles(16, few, 4, 5, 16, 128),
            Tiles(64, few, 4, 3, 8, 256),
            Tiles(128, 64 if width > 128 else 128, 8, 3, 2, 1024),
        ]
    return tuple(_fitted(tiles, width, itemsize, shared_memory) for tiles in sizes)


def _fitted(tiles: Tiles, width: int, itemsize: int, shared_memory: int) -> Tiles:
    """Take off as many stages, and then keys, as there is no memory for."""
    # Results go through there as well as queries.
    queries = tiles.rows * width * itemsize + 4096
    while tiles.num_stages > 1 or tiles.keys > 16:
        buffers = max(tiles.num_stages // 2, 1) * 2 * tiles.keys * width * itemsize
        if queries + buffers <= shared_memory:
            break
        if tiles.num_stages > 2 or tiles.keys <= 16:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        else:
            tiles = tiles._replace(keys=tiles.keys // 2)
    return tiles


class Processors(NamedTuple):
    """What of a device decides on tiles: its processors, and the memory of a program in bytes."""

    number: int
    shared_memory: int


@cache
def processors_of(device: torch.device) -> Processors:
    """Return what `device` has; some small one's where it is a CPU, in the interpreter."""
    if device.type == "cpu":
        return Processors(4, 96 * 1024)
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    return Processors(
        getattr(properties, "multi_processor_count", 64),
        getattr(properties, "shared_memory_per_block_optin", 64 * 1024),
    )
