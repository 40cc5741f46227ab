"""RayPrefixes: which replica of Ray Serve a request goes to, so that it finds its prefix cached."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from hashlib import blake2b

_MOST_PIECES = 64
"""Of a prompt's beginning that are looked at."""

_MOST_KEPT = 100_000


class Prefixes:
    """Beginnings of prompts, and who had them last.

    Two prompts that begin alike have the same keys for as long as they do, since each key is of all
    that comes before, too. What was longest not asked for is forgotten first.

    Parameters
    ----------
    piece : int
        Bytes from one key to the next.
    most : int
        Keys that are kept.
    """

    def __init__(self, piece: int = 128, most: int = _MOST_KEPT) -> None:
        self._piece = piece
        self._most = most
        self._owners: dict[bytes, Hashable] = {}

    def keys(self, text: bytes) -> list[bytes]:
        """Return the keys of a prompt's beginning, the shortest beginning's first.

        One that is shorter than a piece has a key as well: of all of it.
        """
        digest = blake2b(digest_size=16)
        found = []
        end = max(self._piece, len(text) // self._piece * self._piece)
        for start in range(0, min(end, self._piece * _MOST_PIECES), self._piece):
            digest.update(text[start : start + self._piece])
            found.append(digest.copy().digest())
        return found

    def find(self, keys: Sequence[bytes], among: Collection[Hashable]) -> Hashable | None:
        """Return who had the longest of these beginnings, of those that are still there."""
        for key in reversed(keys):
            owner = self._owners.get(key)
            if owner is not None and owner in among:
                return owner
        return None

    def note(self, keys: Sequence[bytes], owner: Hashable) -> None:
        """Remember who has a prompt's beginnings from now on."""
        for key in keys:
            self._owners.pop(key, None)  # and so to the end of the order
            self._owners[key] = owner
        while len(self._owners) > self._most:
            del self._owners[next(iter(self._owners))]

    def forget(self, kept: Collection[Hashable]) -> None:
        """Forget all who are no more."""
        self._owners = {key: owner for key, owner in self._owners.items() if owner in kept}
