"""Random schedules against a KV cache that remembers what each slot was written for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.block_pool import NULL_BLOCK, BlockPool, root_key
from quire.engine.host_blocks import HostBlocks
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence, SequenceStatus
from quire.engine.step_plan import StepPlan

PREFIXES = [[1] * 9, [1] * 8 + [2], [3, 4] * 6, [5]]


class SchedulerStates(RuleBasedStateMachine):
    """Adds, steps, parks, finishes and resets in any order.

    The oracle is ``slots``: for every slot of the cache, the tokens whose key and value a real
    model would have left there (the token and all before it). A sequence may only ever rely on
    slots that were written for exactly its own tokens.
    """

    @initialize(
        num_blocks=st.integers(8, 14),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 40),
        chunked=st.booleans(),
        by_priority=st.booleans(),
        caching=st.booleans(),
        num_host_blocks=st.sampled_from([0, 0, 3, 20]),
        overlapped=st.booleans(),
    )
    def start(
        self,
        num_blocks,
        max_num_seqs,
        budget,
        chunked,
        by_priority,
        caching,
        num_host_blocks,
        overlapped,
    ):
        self.size = 4
        self.capacity = (num_blocks - 1) * self.size
        self.pool = BlockPool(num_blocks, self.size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget if chunked else max(budget, self.capacity),
            chunked_prefill=chunked,
            preempt_by_priority=by_priority,
            host_blocks=HostBlocks(lambda: self, self.size) if num_host_blocks else None,
        )
        self.num_blocks = num_host_blocks  # as a HostCache has it
        self.host_slots: dict[int, tuple] = {}
        self.overlapped = overlapped
        self.in_flight: list[tuple[Sequence, int, bool]] = []
        self.caching = caching
        self.by_priority = by_priority
        self.slots: dict[int, tuple] = {}
        self.alive: list[Sequence] = []
        self.count = 0

    def context(self, sequence: Sequence, position: int) -> tuple:
        tokens = sequence.tokens(0, position + 1)
        if len(tokens) <= position:  # known to the device alone
            tokens += [token for other, token, _ in self.in_flight if other is sequence]
        return (sequence.root_key, *tokens)

    def save(self, pairs):
        """Copy to the host's blocks; this and `restore` are what a HostCache does."""
        for block, host in pairs:
            for i in range(self.size):
                self.host_slots[host * self.size + i] = self.slots.get(block * self.size + i)

    def restore(self, pairs):
        """Copy back from there."""
        for block, host in pairs:
            for i in range(self.size):
                self.slots[block * self.size + i] = self.host_slots[host * self.size + i]

    @rule(
        prefix=st.sampled_from(PREFIXES),
        tail=st.lists(st.integers(1, 3), max_size=6),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "a"]),
        whole=st.booleans(),
    )
    def add(self, prefix, tail, priority, salt, whole):
        prompt = (prefix + tail)[: self.capacity - 1]
        name = str(self.count)
        self.count += 1
        sequence = Sequence(
            name,
            0,
            prompt,
            order=(priority if self.by_priority else 0, self.count, 0),
            root_key=root_key(salt, None if self.caching else name),
            publish=self.caching,
            skip_cached_prefix=whole,
            max_tokens=7,
        )
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: any(s.status is not SequenceStatus.PARKED for s in self.alive))
    @rule(token=st.integers(1, 3), park=st.booleans())
    def step(self, token, park):
        self.run_step(token, park)

    def run_step(self, token: int, park: bool) -> StepPlan:
        may_be_empty = bool(self.in_flight)
        if not self.scheduler.can_go_ahead():
            self.settle()
        awake = [s for s in self.alive if s.status is not SequenceStatus.PARKED]
        if not awake:
            return StepPlan()
        first = min(awake)
        was_running = first.status is SequenceStatus.RUNNING
        plan = self.scheduler.schedule()
        if self.in_flight:
            pending = {id(sequence) for sequence, _, _ in self.in_flight}
            assert not pending & set(map(id, plan.preempted)), "lost blocks while in flight"
        if not plan.sequences and may_be_empty:
            self.scheduler.forget_saved(plan)
            self.settle()
            return plan
        assert plan.sequences, "a step with work to do computes something"
        if plan.swap_out:
            self.scheduler.host_blocks.copy_out(plan.swap_out)
        if plan.swap_in:
            self.scheduler.host_blocks.copy_in(plan.swap_in)
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(plan.sequences) == len(set(map(id, plan.sequences)))
        assert not (was_running and first in plan.preempted), "the first in order lost its blocks"
        for sequence, count in zip(plan.sequences, plan.num_new_tokens, strict=True):
            assert count > 0
            computed = sequence.num_computed_tokens
            assert computed + count <= sequence.num_tokens
            if sequence.skip_cached_prefix and sequence in plan.admitted:
                assert computed == 0 or plan.swap_in, "a prefix that was not to be found"
            for position in range(computed + count):
                block = sequence.block_ids[position // self.size]
                assert block != NULL_BLOCK
                slot = block * self.size + position % self.size
                if position < computed:
                    assert self.slots[slot] == self.context(sequence, position), "foreign values"
                else:
                    self.slots[slot] = self.context(sequence, position)
        # Nothing that this step wrote may have hit what others rely on.
        for sequence in self.scheduler.running:
            for position in range(sequence.num_computed_tokens):
                slot = sequence.block_ids[position // self.size] * self.size
                assert self.slots[slot + position % self.size] == self.context(sequence, position)
        self.settle()
        self.scheduler.update(plan)
        for sequence in plan.sequences:
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.num_computed_tokens == sequence.num_tokens:
                if sequence.num_tokens >= self.capacity or len(sequence.output_token_ids) >= 6:
                    self.finish_one(sequence)
                elif park:
                    self.scheduler.park(sequence)
                elif self.overlapped:
                    ends = token == 3 and len(sequence.output_token_ids) > 1
                    sequence.num_pending_tokens = 1
                    self.in_flight.append((sequence, token, ends))
                else:
                    sequence.output_token_ids.append(token)
        return plan

    def settle(self) -> None:
        """Give sequences the tokens in flight; some end by them."""
        in_flight, self.in_flight = self.in_flight, []
        for sequence, token, ends in in_flight:
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_pending_tokens = 0
            sequence.output_token_ids.append(token)
            if ends or len(sequence.output_token_ids) >= 7:
                self.finish_one(sequence)

    def finish_one(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)

    @precondition(lambda self: any(s.status is SequenceStatus.PARKED for s in self.alive))
    @rule(data=st.data(), token=st.integers(1, 3))
    def unpark(self, data, token):
        parked = [s for s in self.alive if s.status is SequenceStatus.PARKED]
        sequence = data.draw(st.sampled_from(parked))
        sequence.output_token_ids.append(token)
        self.scheduler.unpark(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.finish_one(data.draw(st.sampled_from(self.alive)))

    @rule()
    def reset_cache(self):
        self.pool.reset()
        assert self.pool.num_published == 0

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity(self.alive)

    def teardown(self):
        """Whatever came before, all that is left finishes, and no block stays behind."""
        if not hasattr(self, "alive"):
            return
        for sequence in [s for s in self.alive if s.status is SequenceStatus.PARKED]:
            sequence.output_token_ids.append(1)
            self.scheduler.unpark(sequence)
        for _ in range(10_000):
            self.settle()
            if not self.alive:
                break
            self.run_step(1, park=False)
        assert not self.alive, "the scheduler makes no progress"
        assert self.pool.num_free == self.pool.num_blocks - 1
        host_blocks = self.scheduler.host_blocks
        assert host_blocks is None or host_blocks.num_used == 0
        self.scheduler.check_integrity([])


TestSchedulerStates = SchedulerStates.TestCase
TestSchedulerStates.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestSchedulerStatesAtLength(SchedulerStates.TestCase):
    """Thousands of random schedules."""

    settings = settings(max_examples=3000, stateful_step_count=60, deadline=None)
