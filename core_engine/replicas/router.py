"""Router: which copy of an engine serves a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.engine.block_pool import block_keys, root_key

if TYPE_CHECKING:
    from quire.engine.request import Request

MOST_LEAD = 16
"""Sequences that a replica has in flight more than another and is still sent one more."""

_TOKENS_PER_LEAD = 32
"""Prompt tokens of which computing takes about as long as one more sequence makes others wait."""

_MOST_BLOCKS = 128
"""Blocks of a prompt's beginning that are looked at."""

_MOST_KEYS = 1 << 16
"""Blocks that are remembered."""


def choose(
    held: Sequence[int], loads: Sequence[int | None], seats: int, *, block_size: int, turn: int = 0
) -> int:
    """Return the replica that serves a request.

    It is the one that has the longest beginning of the prompt in its cache, unless it has so many
    more sequences in flight than the one with the fewest that waiting costs more than computing
    that beginning; or no seat, where the other has one.

    Parameters
    ----------
    held
        By replica, blocks of the prompt's beginning that it has.
    loads
        By replica, sequences in flight; None where it is lost. Not all are.
    seats
        Sequences that a replica computes at once.
    block_size
        Tokens per block.
    turn
        The first of the replicas that are alike.
    """
    alive = [i for i, load in enumerate(loads) if load is not None]
    known = [load or 0 for load in loads]

    def place(i: int) -> int:
        return (i - turn) % len(loads)

    least = min(alive, key=lambda i: (known[i], -held[i], place(i)))
    best = min(alive, key=lambda i: (-held[i], known[i], place(i)))
    saved = (held[best] - held[least]) * block_size
    if saved <= 0 or known[least] < seats <= known[best]:
        return least
    lead = known[best] - known[least]
    return best if lead <= min(MOST_LEAD, 1 + saved // _TOKENS_PER_LEAD) else least


class Router:
    """Remembers what was sent where, so that equal beginnings go to one replica.

    Parameters
    ----------
    count : int
        Replicas.
    seats : int
        Sequences that each computes at once.
    block_size : int
        Tokens per block of their KV caches.
    shares_prefixes : bool
        Whether they keep what they have computed.
    """

    def __init__(self, count: int, *, seats: int, block_size: int, shares_prefixes: bool) -> None:
        self._count = count
        self._seats = seats
        self._block_size = block_size
        self._shares_prefixes = shares_prefixes
        self._turn = 0
        # Block key to the replicas that were sent it, a bit each; the latest last.
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def route(self, request: Request, loads: Sequence[int | None]) -> int:
        """Return the replica that serves a request; see `choose`."""
        keys = self._keys(request)
        chosen = choose(
            self._held(keys), loads, self._seats, block_size=self._block_size, turn=self._turn
        )
        self._turn = (chosen + 1) % self._count
        self._note(keys, chosen)
        return chosen

    def note(self, request: Request, replica: int) -> None:
        """Take in that a request is served by a replica, for whatever reason."""
        self._note(self._keys(request), replica)

    def forget(self, replica: int | None = None) -> None:
        """Forget what a replica was sent, or all of them."""
        if replica is None:
            self._known.clear()
            return
        for key, replicas in list(self._known.items()):
            left = replicas & ~(1 << replica)
            if left:
                self._known[key] = left
            else:
                del self._known[key]

    def _keys(self, request: Request) -> list[bytes]:
        if not self._shares_prefixes:
            return []
        adapter = request.adapter
        root = root_key(request.cache_salt, None if adapter is None else adapter.digest)
        tokens = request.prompt_token_ids[: _MOST_BLOCKS * self._block_size]
        return block_keys(tokens, self._block_size, root)

    def _held(self, keys: Sequence[bytes]) -> list[int]:
        held = [0] * self._count
        going_on = (1 << self._count) - 1
        for depth, key in enumerate(keys, 1):
            going_on &= self._known.get(key, 0)
            if not going_on:
                break
            for i in range(self._count):
                if going_on >> i & 1:
                    held[i] = depth
        return held

    def _note(self, keys: Sequence[bytes], replica: int) -> None:
        known = self._known
        # The beginning last: it is the last to be forgotten.
        for key in reversed(keys):
            known[key] = known.get(key, 0) | 1 << replica
            known.move_to_end(key)
        while len(known) > _MOST_KEYS:
            known.popitem(last=False)
