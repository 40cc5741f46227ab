"""Random schedules against a KV cache that remembers what each slot was written for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.block_pool import NULL_BLOCK, BlockPool, root_key
from quire.engine.scheduler import Scheduler
from quire.engine.step_plan import StepPlan
from quire.engine.sequence import Sequence, SequenceStatus

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
    )
    def start(self, num_blocks, max_num_seqs, budget, chunked, by_priority, caching):
        self.size = 4
        self.capacity = (num_blocks - 1) * self.size
        self.pool = BlockPool(num_blocks, self.size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget if chunked else max(budget, self.capacity),
            chunked_prefill=chunked,
            preempt_by_priority=by_priority,
        )
        self.caching = caching
        self.by_priority = by_priority
        self.slots: dict[int, tuple] = {}
        self.alive: list[Sequence] = []
        self.count = 0

    def context(self, sequence: Sequence, position: int) -> tuple:
        return (sequence.root_key, *sequence.tokens(0, position + 1))

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
        )
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: any(s.status is not SequenceStatus.PARKED for s in self.alive))
    @rule(token=st.integers(1, 3), park=st.booleans())
    def step(self, token, park):
        self.run_step(token, park)

    def run_step(self, token: int, park: bool) -> StepPlan:
        first = min(s for s in self.alive if s.status is not SequenceStatus.PARKED)
        was_running = first.status is SequenceStatus.RUNNING
        plan = self.scheduler.schedule()
        assert plan.sequences, "a step with work to do computes something"
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(plan.sequences) == len(set(map(id, plan.sequences)))
        assert not (was_running and first in plan.preempted), "the first in order lost its blocks"
        for sequence, count in zip(plan.sequences, plan.num_new_tokens, strict=True):
            assert count > 0
            computed = sequence.num_computed_tokens
            assert computed + count <= sequence.num_tokens
            if sequence.skip_cached_prefix and sequence in plan.admitted:
                assert computed == 0
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
        self.scheduler.update(plan)
        for sequence in plan.sequences:
            if sequence.num_computed_tokens == sequence.num_tokens:
                if sequence.num_tokens >= self.capacity or len(sequence.output_token_ids) >= 6:
                    self.finish_one(sequence)
                elif park:
                    self.scheduler.park(sequence)
                else:
                    sequence.output_token_ids.append(token)
        return plan

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
            if not self.alive:
                break
            self.run_step(1, park=False)
        assert not self.alive, "the scheduler makes no progress"
        assert self.pool.num_free == self.pool.num_blocks - 1
        self.scheduler.check_integrity([])


TestSchedulerStates = SchedulerStates.TestCase
TestSchedulerStates.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestSchedulerStatesAtLength(SchedulerStates.TestCase):
    """Thousands of random schedules."""

    settings = settings(max_examples=3000, stateful_step_count=60, deadline=None)
