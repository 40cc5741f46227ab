"""AdapterSlots: which adapter lies in which of the model's slots, and how many run with it."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.adapter import PreparedAdapter

SetAdapter = Callable[[int, "PreparedAdapter | None"], None]
"""Puts an adapter, or nothing, into one of the model's slots."""


class LostAdapters:
    """Digests of adapters in slots that nobody refers to any more; any thread may add to it.

    Attributes
    ----------
    notify : callable or None
        Called when there is a new one, on the thread that let go of the adapter.
    """

    def __init__(self) -> None:
        self.notify: Callable[[], None] | None = None
        self._digests: deque[str] = deque()

    def add(self, digest: str) -> None:
        """Note an adapter."""
        self._digests.append(digest)
        if self.notify is not None:
            self.notify()

    def take(self) -> list[str]:
        """Return what there is, and forget it."""
        taken = []
        while self._digests:
            taken.append(self._digests.popleft())
        return taken


class AdapterSlots:
    """A model's slots for adapters.

    An adapter stays in its slot after its last sequence, for the next one, until the slot is
    wanted for another: the least recently used goes first. It is referred to weakly, though: a
    slot is emptied as soon as nobody else needs the adapter, so that its memory goes.

    Parameters
    ----------
    count : int
        Slots; as many different adapters run at once.
    lost : LostAdapters
        Hears of adapters in slots that nobody refers to any more.
    """

    def __init__(self, count: int, lost: LostAdapters) -> None:
        self._lost = lost
        self._count = count
        self._free = list(range(count - 1, -1, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # by digest, the latest used last
        self._refs: dict[str, weakref.ref[PreparedAdapter]] = {}
        self._users: dict[str, int] = {}
        self._changes: list[tuple[int, PreparedAdapter | None]] = []

    @property
    def num_filled(self) -> int:
        """Slots with an adapter."""
        return len(self._slots)

    @property
    def num_unused(self) -> int:
        """Slots that no sequence runs with."""
        return self._count - len(self._users)

    def is_used(self, digest: str) -> bool:
        """Whether a sequence runs with that adapter."""
        return digest in self._users

    def enter(self, adapter: PreparedAdapter) -> int:
        """Give an adapter one more sequence, and return its slot.

        The caller sees to it that the adapter is in use, or a slot is not.
        """
        digest = adapter.digest
        self._users[digest] = self._users.get(digest, 0) + 1
        slot = self._slots.get(digest)
        if slot is None:
            slot = self._free.pop() if self._free else self._evict()
            self._slots[digest] = slot
            lost = self._lost
            self._refs[digest] = weakref.ref(adapter, lambda _: lost.add(digest))
            self._changes.append((slot, adapter))
        self._slots.move_to_end(digest)
        return slot

    def leave(self, adapter: PreparedAdapter) -> None:
        """Take a sequence from an adapter."""
        digest = adapter.digest
        self._users[digest] -= 1
        if self._users[digest] == 0:
            del self._users[digest]
            self._empty_if_lost(digest)

    def collect(self) -> None:
        """Empty the slots of adapters that nobody needs any more."""
        for digest in self._lost.take():
            self._empty_if_lost(digest)

    def apply(self, set_adapter: SetAdapter) -> int:
        """Let the model have what has changed since the last call; return how many adapters came.

        Where that fails, what was not done is not believed to be done.
        """
        changes, self._changes = self._changes, []
        for i, (slot, adapter) in enumerate(changes):
            try:
                set_adapter(slot, adapter)
            except BaseException:
                undone = {slot for slot, _ in changes[i:]}
                for digest in [d for d, s in self._slots.items() if s in undone]:
                    self._empty(digest)
                self._changes.clear()  # they are as empty as they were, or broken
                raise
        return sum(adapter is not None for _, adapter in changes)

    def _evict(self) -> int:
        digest = next(digest for digest in self._slots if digest not in self._users)
        del self._refs[digest]
        return self._slots.pop(digest)

    def _empty_if_lost(self, digest: str) -> None:
        # Another adapter of that digest may have come meanwhile, or sequences may run with one.
        if digest in self._slots and digest not in self._users and self._refs[digest]() is None:
            self._empty(digest)

    def _empty(self, digest: str) -> None:
        slot = self._slots.pop(digest)
        del self._refs[digest]
        self._free.append(slot)
        self._changes.append((slot, None))

    def check_integrity(self, running: list[PreparedAdapter]) -> None:
        """Raise AssertionError unless slots and users agree with each other.

        Parameters
        ----------
        running : list of PreparedAdapter
            Those of all sequences that run.
        """
        users: dict[str, int] = {}
        for adapter in running:
            users[adapter.digest] = users.get(adapter.digest, 0) + 1
        assert users == self._users, f"adapters of sequences: {users}, counted {self._users}"
        assert users.keys() <= self._slots.keys(), "a sequence runs with an adapter in no slot"
        slots = sorted([*self._slots.values(), *self._free])
        assert slots == list(range(self._count)), f"slots lost or doubled: {slots}"
        assert self._refs.keys() == self._slots.keys()
