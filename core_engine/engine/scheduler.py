"""Scheduler: who computes how many tokens this step."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable

from quire.engine.adapter_queue import AdapterQueue
from quire.engine.adapter_slots import AdapterSlots
from quire.engine.block_pool import BlockPool, block_keys
from quire.engine.host_blocks import HostBlocks
from quire.engine.sequence import Sequence, SequenceStatus
from quire.engine.step_plan import StepPlan


class Scheduler:
    """Continuous batching over a :class:`BlockPool`.

    Each step lets every sequence catch up (``num_computed_tokens`` with ``num_tokens``) within a
    budget of tokens: running ones first, in order, then waiting ones. Drafts, tokens that a
    sequence may well be given next, take part in a step as far as tokens and blocks are left for
    them. When the blocks run out, the last sequence in order gives its blocks back and waits to
    compute them anew, or to have them copied back where there are host blocks for it. The first in
    order is never preempted by another, and any sequence that was admitted fits the pool alone, so
    the engine always makes progress.

    Parameters
    ----------
    pool : BlockPool
    max_num_seqs : int
        Sequences that run at once.
    max_num_batched_tokens : int
        Budget of tokens of a step.
    chunked_prefill : bool
        Whether a prompt may be computed over several steps.
    preempt_by_priority : bool
        Whether a waiting sequence may displace running ones of a worse priority (the first part
        of their ``order``).
    adapter_slots : AdapterSlots, optional
        For sequences with adapters; see :class:`~quire.engine.adapter_queue.AdapterQueue`.
    host_blocks : HostBlocks, optional
        For what preempted sequences have computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked_prefill: bool = True,
        preempt_by_priority: bool = False,
        adapter_slots: AdapterSlots | None = None,
        host_blocks: HostBlocks | None = None,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.preempt_by_priority = preempt_by_priority
        self.adapter_slots = adapter_slots
        self.host_blocks = host_blocks
        self._adapters = None
        if adapter_slots is not None:
            self._adapters = AdapterQueue(adapter_slots, most_passed=max_num_seqs)
        self.running: list[Sequence] = []  # sorted by order
        self._waiting: list[Sequence] = []  # a heap by order; finished ones are skipped lazily
        self.num_waiting = 0
        self._promised: dict[bytes, Sequence] = {}  # keys of blocks that a running one will compute

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits to."""
        return bool(self.running) or self.num_waiting > 0

    # -- entering and leaving ------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the pool alone."""
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._waiting, sequence)
        self.num_waiting += 1

    def park(self, sequence: Sequence) -> None:
        """Let a running sequence rest until :meth:`unpark`; its blocks are taken first."""
        sequence.status = SequenceStatus.PARKED

    def unpark(self, sequence: Sequence) -> None:
        """Let a parked sequence, which has a new token, go on."""
        if sequence.block_ids:
            sequence.status = SequenceStatus.RUNNING
        else:  # its blocks were taken meanwhile
            self.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out for good and free its blocks."""
        if sequence.status is SequenceStatus.WAITING:
            self.num_waiting -= 1
        elif sequence.block_ids:
            self._stop(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.adapter = None  # it may stay in the queue for a while
        self._release_blocks(sequence)
        if sequence.host_block_ids:
            self._forget_saved(sequence)

    # -- the step ------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Choose the work of the next step and give it blocks."""
        plan = StepPlan()
        if self.preempt_by_priority:
            self._displace(plan)
        if self._adapters is not None:
            for sequence in self._adapters.take_back():
                heapq.heappush(self._waiting, sequence)
        displaced = len(plan.preempted)
        budget = self._add_drafts(plan, 0, self._schedule_running(plan))
        if len(plan.preempted) == displaced:  # else whoever enters would be the next to leave
            num_running = len(plan.sequences)
            budget = self._schedule_waiting(plan, budget)
            self._add_drafts(plan, num_running, budget)
        return plan

    def can_go_ahead(self) -> bool:
        """Whether the next step takes no blocks, and no slot, from sequences that run.

        Then it can be scheduled while the tokens of the last one are known to the device alone.
        """
        running = self.running
        if self.preempt_by_priority and running:
            waiting = [self._peek()]
            if self._adapters is not None:
                waiting.append(self._adapters.first())
            last = running[-1].order[0]
            if any(each is not None and each.order[0] < last for each in waiting):
                return False
        size, budget, free = self.pool.block_size, self.max_num_batched_tokens, self.pool.num_free
        if free > len(running) + budget // size:  # more than any step can want
            return True
        for sequence in running:
            count = min(self._num_wanted(sequence), budget)
            if count > 0:
                computed = sequence.num_computed_tokens
                free -= max(0, self._ceil_blocks(computed + count) - len(sequence.block_ids))
                budget -= count
        return free >= 0

    def _num_wanted(self, sequence: Sequence) -> int:
        """Return how many tokens a running sequence has to compute."""
        if sequence.status is SequenceStatus.PARKED:
            return 0
        if sequence.num_pending_tokens and sequence.is_ending:
            return 0
        return sequence.num_tokens - sequence.num_computed_tokens

    def _schedule_running(self, plan: StepPlan) -> int:
        budget = self.max_num_batched_tokens
        size, running = self.pool.block_size, self.running
        i = 0
        while i < len(running) and budget > 0:
            sequence = running[i]
            count = min(self._num_wanted(sequence), budget)
            if count <= 0:
                i += 1
                continue
            computed = sequence.num_computed_tokens
            wanted = -(-(computed + count) // size) - len(sequence.block_ids)
            if wanted > 0:
                while wanted > self.pool.num_free:
                    victim = self._victim()
                    if victim < sequence:  # it is parked, so not in the plan
                        i -= 1
                    self._preempt(victim, plan)
                    if victim is sequence:
                        break
                if sequence.status is not SequenceStatus.RUNNING:
                    continue
                sequence.block_ids.extend(self.pool.allocate(wanted))
                plan.grown.append(sequence)
            plan.add(sequence, count)
            budget -= count
            i += 1
        return budget

    def _add_drafts(self, plan: StepPlan, first: int, budget: int) -> int:
        """Let sequences that catch up compute their drafts, without taking anything from others."""
        size = self.pool.block_size
        for place in range(first, len(plan.sequences) if budget > 0 else first):
            sequence = plan.sequences[place]
            if not sequence.draft_token_ids:
                continue
            end = sequence.num_computed_tokens + plan.num_new_tokens[place]
            if end < sequence.num_tokens:
                continue
            blocks = len(sequence.block_ids) + self.pool.num_free
            count = min(len(sequence.draft_token_ids), budget, blocks * size - end)
            if count <= 0:
                continue
            wanted = self._ceil_blocks(end + count) - len(sequence.block_ids)
            if wanted > 0:
                sequence.block_ids.extend(self.pool.allocate(wanted))
                plan.grown.append(sequence)
            plan.add_drafts(place, count)
            budget -= count
        return budget

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> int:
        deferred: list[Sequence] = []
        while budget > 0 and (sequence := self._peek()) is not None:
            if plan.sequences and len(self.running) + len(deferred) >= self.max_num_seqs:
                break  # before the prefix is looked up in vain
            if self._adapters is not None and not self._adapters.may_enter(sequence):
                self._adapters.set_aside(heapq.heappop(self._waiting))
                continue
            hits = self._match(sequence)
            computed = self._num_found(sequence, hits)
            if self._is_promised(sequence, computed):
                deferred.append(heapq.heappop(self._waiting))
                continue
            count = sequence.num_tokens - computed
            if count > budget:
                if not self.chunked_prefill:
                    break
                count = budget
            wanted = self._ceil_blocks(computed + count) - len(hits)
            if not self._has_room(hits, wanted):
                # What parked sequences hold is worth less than a step without work.
                parked = [s for s in self.running if s.status is SequenceStatus.PARKED]
                if plan.sequences or not parked:
                    break
                self._preempt(parked[-1], plan)
                continue
            self._admit(sequence, hits, wanted, plan)
            plan.add(sequence, count)
            plan.admitted.append(sequence)
            plan.grown.append(sequence)
            budget -= count
        for sequence in deferred:
            heapq.heappush(self._waiting, sequence)
        return budget

    def _admit(self, sequence: Sequence, hits: list[int], wanted: int, plan: StepPlan) -> None:
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        if self._adapters is not None:
            self._adapters.enter(sequence)
        self.pool.share(hits)
        sequence.block_ids = [*hits, *self.pool.allocate(wanted)]
        sequence.num_computed_tokens = self._num_found(sequence, hits)
        if sequence.host_block_ids:
            self._restore(sequence, len(hits), plan)
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence)
        if sequence.publish:
            first = sequence.num_computed_tokens // self.pool.block_size
            for key in sequence.block_keys[first:]:
                self._promised.setdefault(key, sequence)

    def update(self, plan: StepPlan) -> None:
        """Record that a step has run: its tokens are computed, its full blocks can be found.

        Drafts are not among them before :meth:`advance` says so. Sequences that have ended since
        it was scheduled are passed over.
        """
        for sequence, first, last in plan.restored:
            if sequence.publish and sequence.status is not SequenceStatus.FINISHED:
                self._publish(sequence, first, last)
        for place, sequence in enumerate(plan.sequences):
            if sequence.status is not SequenceStatus.FINISHED:
                self.advance(sequence, plan.num_new_tokens[place] - plan.num_drafts[place])

    def advance(self, sequence: Sequence, count: int) -> None:
        """Record that some more of a sequence's tokens are computed."""
        size = self.pool.block_size
        before = sequence.num_computed_tokens
        after = sequence.num_computed_tokens = before + count
        if sequence.publish and after // size > before // size:
            self._publish(sequence, before // size, after // size)

    # -- details -------------------------------------------------------------------------------

    def _publish(self, sequence: Sequence, first: int, last: int) -> None:
        size = self.pool.block_size
        self._extend_keys(sequence, last)
        for i in range(first, last):
            tokens = sequence.tokens(i * size, (i + 1) * size)
            self.pool.publish(sequence.block_ids[i], sequence.block_keys[i], tokens)
            if self._promised.get(sequence.block_keys[i]) is sequence:
                del self._promised[sequence.block_keys[i]]

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.pool.block_size
        known = len(sequence.block_keys)
        if known < num_blocks:
            tokens = sequence.tokens(known * size, num_blocks * size)
            previous = sequence.block_keys[-1] if known else sequence.root_key
            sequence.block_keys.extend(block_keys(tokens, size, previous))

    def _match(self, sequence: Sequence) -> list[int]:
        if not sequence.publish or sequence.skip_cached_prefix:
            return []
        # At least one token must be computed, or there would be no logits to go on from.
        num_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        self._extend_keys(sequence, num_blocks)
        tokens = sequence.tokens(0, num_blocks * self.pool.block_size)
        return self.pool.match(sequence.block_keys[:num_blocks], tokens)

    def _has_room(self, hits: list[int], wanted: int) -> bool:
        free = self.pool.num_free - self.pool.num_free_among(hits)
        return len(self.running) < self.max_num_seqs and wanted <= free

    def _restore(self, sequence: Sequence, num_hits: int, plan: StepPlan) -> None:
        """Have what the prefix cache lacks copied back from the host.

        Who is preempted by this plan was so before: nothing more is copied to these host blocks.
        """
        assert self.host_blocks is not None
        plan.swap_in += self.host_blocks.restore(sequence, num_hits)
        num_full = sequence.num_computed_tokens // self.pool.block_size
        if num_full > num_hits:
            plan.restored.append((sequence, num_hits, num_full))

    def _num_found(self, sequence: Sequence, hits: list[int]) -> int:
        """Return how many tokens need not be computed, by the prefix cache or by host blocks."""
        saved = min(sequence.num_saved_tokens, sequence.num_tokens - 1)
        return max(len(hits) * self.pool.block_size, saved)

    def _is_promised(self, sequence: Sequence, num_found: int) -> bool:
        """Whether a running sequence is about to compute the next block of a waiting one.

        Prompts with a common beginning that come together would else compute it several times.
        Nobody waits for a sequence behind it in order, which may be kept from running.
        """
        if not sequence.publish or sequence.skip_cached_prefix:
            return False
        size = self.pool.block_size
        if num_found // size >= (sequence.num_tokens - 1) // size:
            return False
        running = self._promised.get(sequence.block_keys[num_found // size])
        return running is not None and running < sequence

    def _withdraw_promises(self, sequence: Sequence) -> None:
        for key in sequence.block_keys[sequence.num_computed_tokens // self.pool.block_size :]:
            if self._promised.get(key) is sequence:
                del self._promised[key]

    def _forget_saved(self, sequence: Sequence) -> None:
        assert self.host_blocks is not None
        self.host_blocks.forget(sequence)

    def forget_saved(self, plan: StepPlan) -> None:
        """Record that what a plan was to copy to the host may not have come there."""
        for sequence in plan.preempted:
            if sequence.host_block_ids:
                self._forget_saved(sequence)

    def _ceil_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _victim(self) -> Sequence:
        for sequence in reversed(self.running):
            if sequence.status is SequenceStatus.PARKED:
                return sequence
        return self.running[-1]

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self._stop(sequence)
        if self.host_blocks is not None:
            plan.swap_out += self.host_blocks.save(sequence)
        sequence.num_computed_tokens = 0
        self._release_blocks(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self.add(sequence)
        plan.preempted.append(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence from those that run."""
        self.running.remove(sequence)
        self._withdraw_promises(sequence)
        if self._adapters is not None:
            self._adapters.leave(sequence)

    def _displace(self, plan: StepPlan) -> None:
        """Make room for a waiting sequence of a better priority than the last running ones."""
        first = self._peek()
        if self._adapters is not None:
            first = self._first_with_slot(first, self._adapters, plan)
        if first is None:
            return
        hits = self._match(first)
        computed = self._num_found(first, hits)
        if self._is_promised(first, computed):
            return  # it would not enter yet
        count = min(first.num_tokens - computed, self.max_num_batched_tokens)
        wanted = self._ceil_blocks(computed + count) - len(hits)
        while (
            self.running
            and self.running[-1].order[0] > first.order[0]
            and not self._has_room(hits, wanted)
        ):
            self._preempt(self.running[-1], plan)

    def _first_with_slot(
        self, first: Sequence | None, adapters: AdapterQueue, plan: StepPlan
    ) -> Sequence | None:
        """Return the first waiting sequence that needs no slot, or has one, or is given one."""
        for sequence in sorted(each for each in (adapters.first(), first) if each is not None):
            in_the_way = adapters.in_the_way(sequence, self.running)
            if in_the_way is not None:
                for victim in in_the_way:
                    self._preempt(victim, plan)
                return sequence
        return None

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []

    def _peek(self) -> Sequence | None:
        while self._waiting and self._waiting[0].status is not SequenceStatus.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0] if self._waiting else None

    def check_integrity(self, alive: Iterable[Sequence]) -> None:
        """Raise AssertionError unless blocks, lists and states agree with each other.

        Parameters
        ----------
        alive : iterable of Sequence
            Every sequence that was added and not finished.
        """
        alive = list(alive)
        self.pool.check_integrity([s.block_ids for s in alive])
        if self.host_blocks is not None:
            self.host_blocks.check_integrity(alive)
        assert not any(s.host_block_ids for s in self.running if s.block_ids), "kept twice"
        assert self.running == sorted(self.running), "running is not in order"
        assert len(self.running) <= self.max_num_seqs
        waiting = [s for s in alive if s.status is SequenceStatus.WAITING]
        assert len(waiting) == self.num_waiting, "num_waiting is wrong"
        assert all(not s.block_ids for s in waiting), "a waiting sequence holds blocks"
        for key, sequence in self._promised.items():
            first = sequence.num_computed_tokens // self.pool.block_size
            assert sequence in self.running, f"{sequence} promises blocks and does not run"
            assert key in sequence.block_keys[first:], f"{sequence} promises what it has computed"
        for sequence in self.running:
            assert sequence.status in (SequenceStatus.RUNNING, SequenceStatus.PARKED)
            held = len(sequence.block_ids) * self.pool.block_size
            assert sequence.num_computed_tokens <= held, f"{sequence} computed without blocks"
            in_slot = sequence.adapter_slot >= 0
            assert in_slot == (sequence.adapter is not None), f"{sequence} has no slot"
        assert all(s.adapter_slot < 0 for s in waiting), "a waiting sequence has a slot"
        if self.adapter_slots is not None:
            self.adapter_slots.check_integrity([s.adapter for s in self.running if s.adapter])
