"""AdapterQueue: who waits for an adapter's slot, and whom they let pass."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from quire.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from quire.engine.adapter_slots import AdapterSlots


class AdapterQueue:
    """The sequences whose adapter finds no slot, kept apart from those that may enter.

    Nobody who needs no slot waits for one, nor does anybody whose adapter is in one already. But
    an adapter that is asked for again and again would keep its slot for ever: so the first in
    order who waits for a slot is passed by at most so many; then all who come after it, and have
    an adapter, wait too, until it has a slot. Slots come free meanwhile, because every sequence
    ends. What has begun goes on: its parts may wait for each other.

    Parameters
    ----------
    slots : AdapterSlots
    most_passed : int
        How many with adapters may enter before the first who waits.
    """

    def __init__(self, slots: AdapterSlots, most_passed: int) -> None:
        self._slots = slots
        self._most_passed = most_passed
        self._groups: dict[str, list[Sequence]] = {}  # heaps, by the adapter that finds no slot
        self._barred: list[Sequence] = []  # those who would pass once too often
        self._first: Sequence | None = None  # of the groups, as this step knows them

    # -- in and out of slots -------------------------------------------------------------------

    def enter(self, sequence: Sequence) -> None:
        """Give a sequence that enters its slot."""
        adapter = sequence.adapter
        if adapter is None:
            return
        sequence.adapter_slot = self._slots.enter(adapter)
        first = self._first
        if first is not None and first < sequence and not sequence.has_begun:
            first.num_passed += 1

    def leave(self, sequence: Sequence) -> None:
        """Take the slot of a sequence that does not run any more."""
        if sequence.adapter is not None and sequence.adapter_slot >= 0:
            sequence.adapter_slot = -1
            self._slots.leave(sequence.adapter)

    # -- waiting -------------------------------------------------------------------------------

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether a sequence has no adapter, or one with a slot, and passes nobody too often."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        is_used = self._slots.is_used(adapter.digest)
        if is_used and sequence.has_begun:
            return True
        return (is_used or self._slots.num_unused > 0) and not self._is_barred(sequence)

    def set_aside(self, sequence: Sequence) -> None:
        """Let a sequence wait that may not enter."""
        assert sequence.adapter is not None
        digest = sequence.adapter.digest
        if self._slots.is_used(digest) or self._slots.num_unused > 0:
            self._barred.append(sequence)
        else:
            heapq.heappush(self._groups.setdefault(digest, []), sequence)
            if self._first is None or sequence < self._first:
                self._first = sequence

    def take_back(self) -> list[Sequence]:
        """Return, and forget, those who may have a chance to enter now."""
        if not self._groups and not self._barred:
            self._first = None
            return []
        returning: list[Sequence] = []
        num_unused = self._slots.num_unused
        for head in self._heads():
            assert head.adapter is not None
            digest = head.adapter.digest
            if not self._slots.is_used(digest):
                if num_unused == 0:
                    continue
                num_unused -= 1
            returning += self._groups.pop(digest)
        first = self._first = self.first()
        if first is None or first.num_passed < self._most_passed:
            returning += self._barred
            self._barred = []
        return [each for each in returning if each.status is SequenceStatus.WAITING]

    def first(self) -> Sequence | None:
        """Return the first in order among those who wait for a slot."""
        heads = self._heads()
        return heads[0] if heads else None

    def in_the_way(self, sequence: Sequence, running: list[Sequence]) -> list[Sequence] | None:
        """Return the running sequences, all of a worse priority, that keep one from a slot.

        None: there are others, too.
        """
        if self.may_enter(sequence):
            return []
        if self._is_barred(sequence):
            return None
        users: dict[str, list[Sequence]] = {}
        for each in running:
            if each.adapter is not None:
                users.setdefault(each.adapter.digest, []).append(each)
        worse = [each for each in users.values() if each[0].order[0] > sequence.order[0]]
        return max(worse, key=lambda each: each[0].order)[::-1] if worse else None

    def _is_barred(self, sequence: Sequence) -> bool:
        first = self._first
        return first is not None and first < sequence and first.num_passed >= self._most_passed

    def _heads(self) -> list[Sequence]:
        """Return the first of each group, in order."""
        heads = []
        for digest, group in list(self._groups.items()):
            while group and group[0].status is not SequenceStatus.WAITING:
                heapq.heappop(group)
            if group:
                heads.append(group[0])
            else:
                del self._groups[digest]
        return sorted(heads)
