"""KVCacheMap: which block of the KV cache holds what, at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quire.engine.block_pool import BlockPool
    from quire.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class KVBlock:
    """One block of the KV cache.

    Attributes
    ----------
    request_ids : tuple of str
        The requests that use it, in the order of their arrival; several share a common beginning.
    is_cached : bool
        Whether the prefix cache can find it: it is full, and its tokens are known.
    """

    request_ids: tuple[str, ...] = ()
    is_cached: bool = False

    @property
    def state(self) -> Literal["free", "cached", "used", "shared"]:
        """Used by one request or shared by several; cached or free where nobody uses it."""
        if self.request_ids:
            return "used" if len(self.request_ids) == 1 else "shared"
        return "cached" if self.is_cached else "free"


@dataclass(frozen=True, slots=True)
class KVCacheMap:
    """The KV cache at one moment, block by block.

    Attributes
    ----------
    block_size : int
        Tokens per block.
    blocks : list of KVBlock
        All that there are, in the order in which they lie in memory.
    dtype : str
        What keys and values are kept in, as the engine argument ``kv_cache_dtype`` says it.
    """

    block_size: int
    blocks: list[KVBlock]
    dtype: str = "auto"

    def count(self, state: str) -> int:
        """Return how many blocks are in a state: "free", "cached", "used" or "shared"."""
        return sum(block.state == state for block in self.blocks)

    def blocks_of(self, request_id: str) -> list[int]:
        """Return the places of the blocks that a request uses, as they lie in memory."""
        return [i for i, block in enumerate(self.blocks) if request_id in block.request_ids]

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{self.count(state)} {state}" for state in ("used", "shared", "cached", "free")
        )
        of_dtype = "" if self.dtype == "auto" else f" in {self.dtype}"
        return (
            f"KVCacheMap({len(self.blocks)} blocks of {self.block_size} tokens{of_dtype}: {counts})"
        )


def map_blocks(pool: BlockPool, sequences: Iterable[Sequence], dtype: str = "auto") -> KVCacheMap:
    """Return what each block of a pool holds, the null block left out.

    Parameters
    ----------
    pool : BlockPool
    sequences : iterable of Sequence
        All that hold blocks, in order.
    dtype : str
        As ``kv_cache_dtype`` has it.
    """
    users: dict[int, dict[str, None]] = {}
    for sequence in sequences:
        for block_id in sequence.block_ids:
            users.setdefault(block_id, {})[sequence.request_id] = None
    blocks = [KVBlock()] * pool.num_blocks
    cached = KVBlock(is_cached=True)
    published = set(pool.published())
    for block_id in published:
        blocks[block_id] = cached
    for block_id, request_ids in users.items():
        blocks[block_id] = KVBlock(tuple(request_ids), block_id in published)
    return KVCacheMap(pool.block_size, blocks[1:], dtype)
