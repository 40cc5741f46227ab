"""KV blocks: allocate, share, evict; and the prefix cache that lies in the free ones."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

NULL_BLOCK = 0
"""Block 0 belongs to nobody and stays zero: block tables are padded with it."""


class Block:
    """One KV block's bookkeeping.

    Attributes
    ----------
    ref_count : int
        How many sequences hold the block. At 0 it lies in the free list, its content intact.
    key : bytes or None
        Digest of its tokens and of all that precede them, while it can be found by it.
    tokens : tuple of int
        The tokens themselves, against which a hit is verified.
    """

    __slots__ = ("block_id", "key", "next_free", "prev_free", "ref_count", "tokens")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.key: bytes | None = None
        self.tokens: tuple[int, ...] = ()
        self.prev_free: Block | None = None
        self.next_free: Block | None = None


class FreeList:
    """A doubly linked list through the blocks themselves: any of them leaves in O(1)."""

    def __init__(self) -> None:
        self._head, self._tail = Block(-1), Block(-1)
        self._head.next_free, self._tail.prev_free = self._tail, self._head
        self.size = 0

    def _insert(self, block: Block, after: Block) -> None:
        before = after.next_free
        assert before is not None
        block.prev_free, block.next_free = after, before
        after.next_free = before.prev_free = block
        self.size += 1

    def append(self, block: Block) -> None:
        """Put a block where it is reused last."""
        assert self._tail.prev_free is not None
        self._insert(block, self._tail.prev_free)

    def prepend(self, block: Block) -> None:
        """Put a block where it is reused first."""
        self._insert(block, self._head)

    def remove(self, block: Block) -> None:
        """Take a block out, wherever it is."""
        before, after = block.prev_free, block.next_free
        assert before is not None
        assert after is not None
        before.next_free, after.prev_free = after, before
        block.prev_free = block.next_free = None
        self.size -= 1

    def pop(self) -> Block:
        """Take out the block to be reused first."""
        block = self._head.next_free
        assert block is not None
        assert block is not self._tail
        self.remove(block)
        return block

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next_free
        while block is not self._tail:
            assert block is not None
            yield block
            block = block.next_free


def root_key(*parts: str | None) -> bytes:
    """Return the key that a chain of blocks starts from.

    Whatever changes the values of keys and values besides the tokens before them goes in here:
    an adapter's digest, a cache salt, the request when nothing is to be shared beyond it.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = b"-" if part is None else b"+" + part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def block_keys(tokens: Sequence[int], block_size: int, previous: bytes) -> list[bytes]:
    """Return the keys of the full blocks of ``tokens``, chained on from ``previous``."""
    num_full = len(tokens) // block_size
    data = array("q", tokens[: num_full * block_size]).tobytes()
    width = len(data) // num_full if num_full else 0
    keys = []
    for i in range(num_full):
        previous = hashlib.sha256(previous + data[i * width : (i + 1) * width]).digest()
        keys.append(previous)
    return keys


class BlockPool:
    """All KV blocks of an engine.

    A block is held by ``ref_count`` sequences. A block that nobody holds is free, and keeps its
    content until it is allocated again: the least recently freed goes first. A full block can be
    published under its key; :meth:`match` finds it then, held or free.

    Parameters
    ----------
    num_blocks : int
        With the null block, which is never handed out.
    block_size : int
        Tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: at least 2 (one is the null block)")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeList()
        for block in self._blocks[1:]:
            self._free.append(block)
        self._published: dict[bytes, Block] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self._free.size

    @property
    def num_published(self) -> int:
        """Blocks that the prefix cache can find."""
        return len(self._published)

    def published(self) -> list[int]:
        """Return the blocks that the prefix cache can find, in no order."""
        return [block.block_id for block in self._published.values()]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks; what they held is forgotten. The caller checks `num_free`."""
        if count > self._free.size:
            raise RuntimeError(f"{count} blocks wanted, {self._free.size} free")
        taken = []
        for _ in range(count):
            block = self._free.pop()
            self._forget(block)
            block.ref_count = 1
            taken.append(block.block_id)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Hold blocks once more, as found by :meth:`match`."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Let go of a sequence's blocks.

        The end of a sequence is less likely to be wanted again than its beginning, so it is
        reused first; a block without a key is of no use to anybody and goes before all.
        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count <= 0:
                raise RuntimeError(f"block {block_id} freed twice")
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.key is None:
                    self._free.prepend(block)
                else:
                    self._free.append(block)

    def publish(self, block_id: int, key: bytes, tokens: Sequence[int]) -> None:
        """Let a full, computed block be found. The first block under a key stays."""
        block = self._blocks[block_id]
        if key not in self._published:
            self._forget(block)
            block.key, block.tokens = key, tuple(tokens)
            self._published[key] = block

    def match(self, keys: Iterable[bytes], tokens: Sequence[int]) -> list[int]:
        """Return the longest run of published blocks for a chain of keys.

        Valid only until the next :meth:`allocate`; :meth:`share` it before that.

        Parameters
        ----------
        keys : iterable of bytes
            Keys of the blocks wanted, in order.
        tokens : sequence of int
            The tokens behind the keys; a block whose tokens differ is no hit.
        """
        found: list[int] = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            start = len(found) * self.block_size
            if block.tokens != tuple(tokens[start : start + self.block_size]):
                break
            found.append(block.block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """Count the blocks that nobody holds: sharing them takes them off the free list."""
        return sum(self._blocks[block_id].ref_count == 0 for block_id in block_ids)

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Make blocks impossible to find; who holds them keeps them."""
        for key in keys:
            block = self._published.get(key)
            if block is not None:
                self._forget(block)
                if block.ref_count == 0:
                    self._free.remove(block)
                    self._free.prepend(block)

    def reset(self) -> None:
        """Forget the whole prefix cache; blocks in use stay in use."""
        self.withdraw(list(self._published))

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            del self._published[block.key]
            block.key, block.tokens = None, ()

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is free or held exactly as often as counted.

        Parameters
        ----------
        holders : iterable of sequences of int
            The block ids of each sequence alive.
        """
        owners = Counter(block_id for ids in holders for block_id in ids)
        free = [block.block_id for block in self._free]
        assert len(free) == len(set(free)) == self._free.size, "free list is inconsistent"
        assert NULL_BLOCK not in owners, "null block handed out"
        assert NULL_BLOCK not in free, "null block is free"
        in_free = set(free)
        for block in self._blocks[1:]:
            held = owners[block.block_id]
            assert block.ref_count == held, (
                f"block {block.block_id}: counted {block.ref_count}, held by {held}"
            )
            assert (held == 0) == (block.block_id in in_free), f"block {block.block_id} leaked"
        for key, block in self._published.items():
            assert block.key == key, f"block {block.block_id} published under another key"
            assert len(block.tokens) == self.block_size
