"""Slots for adapters: right ones in place, nobody starves, and memory goes with the last user."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.adapter_slots import AdapterSlots, LostAdapters
from quire.engine.block_pool import BlockPool, root_key
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence, SequenceStatus
from quire.models.adapter import PreparedAdapter


class Form:
    """What a model would compute with."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


def make_adapter(digest: str) -> PreparedAdapter:
    return PreparedAdapter(digest, 1, Form(digest))


class Model:
    """The slots of a model, which hold on to what was put in."""

    def __init__(self) -> None:
        self.forms: dict[int, Form] = {}

    def set_adapter(self, slot: int, adapter: PreparedAdapter | None) -> None:
        if adapter is None:
            self.forms.pop(slot, None)
        else:
            self.forms[slot] = adapter.form


# -- the slots alone -----------------------------------------------------------------------------


class SlotStates(RuleBasedStateMachine):
    """Adapters come, run, stop and are let go of in any order; the model always has those that run.

    The oracle is the list of those that run, and references to all that live.
    """

    @initialize(count=st.integers(1, 3))
    def start(self, count):
        self.count = count
        self.lost = LostAdapters()
        self.slots = AdapterSlots(count, self.lost)
        self.model = Model()
        self.owned: dict[str, PreparedAdapter] = {}
        self.running: list[tuple[PreparedAdapter, int]] = []

    @rule(digest=st.sampled_from("abcde"))
    def own(self, digest):
        """Somebody reads an adapter; another object than one of that content that was dropped."""
        self.owned.setdefault(digest, make_adapter(digest))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def drop(self, data):
        del self.owned[data.draw(st.sampled_from(sorted(self.owned)))]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def enter(self, data):
        adapter = self.owned[data.draw(st.sampled_from(sorted(self.owned)))]
        if self.slots.is_used(adapter.digest) or self.slots.num_unused:
            self.slots.collect()
            self.running.append((adapter, self.slots.enter(adapter)))
            self.slots.apply(self.model.set_adapter)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data):
        place = data.draw(st.integers(0, len(self.running) - 1))
        adapter, _ = self.running.pop(place)
        self.slots.leave(adapter)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_to_set(self, data):
        """A slot that could not be filled is not believed to be."""
        others = sorted(digest for digest in self.owned if not self.slots.is_used(digest))
        if not others or not self.slots.num_unused:
            return
        adapter = self.owned[data.draw(st.sampled_from(others))]
        self.slots.collect()
        self.slots.enter(adapter)
        if not self.slots._changes:  # it was in a slot
            self.slots.leave(adapter)
            return

        def broken(slot, adapter):
            raise OSError("no slot today")

        try:  # pytest.raises would keep the traceback, and with it the adapter
            self.slots.apply(broken)
        except OSError:
            pass
        else:
            raise AssertionError("the error was lost")
        self.slots.leave(adapter)
        self.slots.apply(self.model.set_adapter)

    @invariant()
    def those_that_run_are_in_their_slots(self):
        if not hasattr(self, "slots"):
            return
        self.slots.check_integrity([adapter for adapter, _ in self.running])
        assert len({adapter.digest for adapter, _ in self.running}) <= self.count
        for adapter, slot in self.running:
            assert self.model.forms[slot].digest == adapter.digest
        by_digest: dict[str, set[int]] = {}
        for adapter, slot in self.running:
            by_digest.setdefault(adapter.digest, set()).add(slot)
        assert all(len(slots) == 1 for slots in by_digest.values())
        assert len(set.union(set(), *by_digest.values())) == len(by_digest)

    def teardown(self):
        if not hasattr(self, "slots"):
            return
        while self.running:
            self.slots.leave(self.running.pop()[0])
        self.owned.clear()
        self.slots.collect()
        self.slots.apply(self.model.set_adapter)
        assert self.slots.num_filled == 0


TestSlotStates = SlotStates.TestCase
TestSlotStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_memory_of_an_adapter_goes_with_its_last_user():
    """An adapter that rests in a slot is not kept by it, and whoever is to empty it is told."""
    lost, model, calls = LostAdapters(), Model(), []
    lost.notify = lambda: calls.append(1)
    slots = AdapterSlots(2, lost)
    adapter = make_adapter("a")
    form = weakref.ref(adapter.form)
    slots.enter(adapter)
    slots.apply(model.set_adapter)
    slots.leave(adapter)
    slots.collect()
    slots.apply(model.set_adapter)
    assert model.forms, "it rests there for the next one"
    assert not calls
    del adapter
    assert calls == [1]
    slots.collect()
    slots.apply(model.set_adapter)
    assert form() is None
    assert slots.num_filled == 0


def test_the_least_recently_used_adapter_makes_room():
    slots, model = AdapterSlots(2, LostAdapters()), Model()
    a, b, c = map(make_adapter, "abc")
    swaps = 0
    for adapter in (a, b, a, c):
        slots.enter(adapter)
        slots.leave(adapter)
        swaps += slots.apply(model.set_adapter)
    assert set(map(id, model.forms.values())) == {id(a.form), id(c.form)}
    assert swaps == 3


# -- in the scheduler ----------------------------------------------------------------------------


@dataclass
class Arrival:
    step: int
    adapter: str | None
    length: int
    priority: int = 0
    sequence: Sequence = field(init=False, repr=False)


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        adapter=st.sampled_from([None, *"aaaabcd"]),
        length=st.integers(1, 8),
        priority=st.integers(0, 2),
    ),
    min_size=1,
    max_size=30,
)


def run(arrivals, *, num_slots, max_num_seqs, num_blocks, by_priority, caching):
    """Run all arrivals; check after each step what must hold, and that all of them end."""
    size = 4
    slots = AdapterSlots(num_slots, LostAdapters())
    adapters = {digest: make_adapter(digest) for digest in "abcd"}
    scheduler = Scheduler(
        BlockPool(num_blocks, size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16,
        preempt_by_priority=by_priority,
        adapter_slots=slots,
    )
    model = Model()
    arrivals = sorted(arrivals, key=lambda a: a.step)
    alive: list[Arrival] = []
    passed: dict[int, int] = {}
    entered: list[Sequence] = []
    for step in range(2000):
        while arrivals and arrivals[0].step <= step:
            arrival = arrivals.pop(0)
            number = len(entered) + len(alive) + len(passed) + step * 1000
            sequence = arrival.sequence = Sequence(
                f"{number}",
                0,
                [5] * 6,
                order=(arrival.priority if by_priority else 0, step, number),
                root_key=root_key(arrival.adapter, None if caching else str(number)),
                publish=caching,
                adapter=adapters.get(arrival.adapter),
            )
            alive.append(arrival)
            scheduler.add(sequence)
        if not alive:
            if not arrivals:
                return
            continue
        waiting = [a for a in alive if a.sequence.status is SequenceStatus.WAITING]
        begun = {id(a.sequence) for a in alive if a.sequence.has_begun}
        plan = scheduler.schedule()
        slots.apply(model.set_adapter)
        assert plan.sequences, "a step with work to do computes something"
        used = {s.adapter.digest for s in plan.sequences if s.adapter is not None}
        assert len(used) <= num_slots
        for sequence in plan.sequences:
            if sequence.adapter is None:
                assert sequence.adapter_slot == -1
            else:
                assert model.forms[sequence.adapter_slot] is sequence.adapter.form
        check_passing(waiting, begun, plan, passed, max_num_seqs, scheduler)
        scheduler.check_integrity([a.sequence for a in alive])
        scheduler.update(plan)
        for arrival in list(alive):
            sequence = arrival.sequence
            if sequence not in plan.sequences:
                continue
            if sequence.num_computed_tokens == sequence.num_tokens:
                if len(sequence.output_token_ids) >= arrival.length:
                    scheduler.finish(sequence)
                    alive.remove(arrival)
                    assert sequence.adapter is None
                else:
                    sequence.output_token_ids.append(7)
    raise AssertionError(f"they do not end: {alive}")


def check_passing(waiting, begun, plan, passed, max_num_seqs, scheduler):
    """No more than `max_num_seqs` new ones with adapters enter before the first who has no slot."""
    still = [a for a in waiting if a.sequence.status is SequenceStatus.WAITING]
    admitted = [s for s in plan.admitted if s.adapter is not None and id(s) not in begun]
    running = {s.adapter.digest for s in scheduler.running if s.adapter is not None}
    slotless = [a for a in still if a.adapter is not None and a.adapter not in running]
    if scheduler.adapter_slots.num_unused or not slotless:
        return
    first = min(slotless, key=lambda a: a.sequence.order).sequence
    passed[id(first)] = passed.get(id(first), 0) + sum(first < s for s in admitted)
    assert passed[id(first)] <= max_num_seqs, f"{first} was passed {passed[id(first)]} times"


@given(
    arrivals=ARRIVALS,
    num_slots=st.integers(1, 3),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.integers(6, 20),
    by_priority=st.booleans(),
    caching=st.booleans(),
)
@settings(max_examples=150)
def test_whoever_comes_everybody_ends(
    arrivals, num_slots, max_num_seqs, num_blocks, by_priority, caching
):
    """Over random arrivals a step has at most so many adapters, each in its slot; nobody starves.

    Blocks are scarce, so that sequences lose them, and their slots, half-way.
    """
    run(
        arrivals,
        num_slots=num_slots,
        max_num_seqs=max_num_seqs,
        num_blocks=num_blocks,
        by_priority=by_priority,
        caching=caching,
    )


def endless(scheduler, adapter, first_number, *, steps, each_step):
    """Run steps in which sequences of one adapter keep coming, so that it never leaves its slot."""
    alive = []
    for step in range(steps):
        for i in range(each_step):
            number = first_number + step * each_step + i
            sequence = Sequence(
                str(number), 0, [1, 2], order=(0, number, 0), root_key=root_key(str(number)),
                adapter=adapter,
            )  # fmt: skip
            scheduler.add(sequence)
            alive.append(sequence)
        plan = scheduler.schedule()
        scheduler.update(plan)
        yield plan
        for sequence in plan.sequences:
            if len(sequence.output_token_ids) >= 2:
                scheduler.finish(sequence)
            else:
                sequence.output_token_ids.append(3)


def make_scheduler(num_slots, *, max_num_seqs=4, **options):
    return Scheduler(
        BlockPool(1000, 4),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        adapter_slots=AdapterSlots(num_slots, LostAdapters()),
        **options,
    )


def make_sequence(number, adapter, priority=0):
    return Sequence(
        str(number), 0, [1, 2, 3], order=(priority, number, 0), root_key=root_key(str(number)),
        adapter=adapter,
    )  # fmt: skip


def test_an_adapter_in_demand_does_not_keep_its_slot_for_ever():
    """Who waits for the only slot is passed a bounded number of times, and then has it."""
    scheduler = make_scheduler(1, max_num_seqs=8)
    popular, rare = make_adapter("popular"), make_adapter("rare")
    steps = endless(scheduler, popular, 100, steps=200, each_step=1)
    next(steps)
    waiting = make_sequence(50, rare)
    scheduler.add(waiting)
    passed = 0
    for plan in steps:
        if waiting in plan.admitted:
            break
        passed += len([s for s in plan.admitted if s.order > waiting.order])
    else:
        raise AssertionError("it never entered")
    assert 0 < passed <= 8


def test_who_needs_no_slot_waits_for_none():
    """Sequences without an adapter, and those whose adapter is in, pass one that waits."""
    scheduler = make_scheduler(1)
    a, b = make_adapter("a"), make_adapter("b")
    sequences = [make_sequence(i, adapter) for i, adapter in enumerate([a, b, None, a])]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan.sequences == [sequences[0], sequences[2], sequences[3]]


def test_a_better_priority_takes_the_slot_of_a_worse_one():
    """All users of one adapter give way, and no more of them than that takes."""
    scheduler = make_scheduler(2, max_num_seqs=8, preempt_by_priority=True)
    a, b, c = map(make_adapter, "abc")
    low = [make_sequence(i, each, priority=2) for i, each in enumerate([a, b, a, b, None])]
    for sequence in low:
        scheduler.add(sequence)
    scheduler.update(scheduler.schedule())
    for sequence in low:
        sequence.output_token_ids.append(1)
    first = make_sequence(9, c, priority=1)
    scheduler.add(first)
    plan = scheduler.schedule()
    assert first in plan.admitted
    assert plan.preempted == [low[3], low[1]]
    scheduler.check_integrity([*low, first])


def test_the_parts_of_a_request_that_has_begun_are_not_kept_apart():
    """A fork of a beam enters past whoever waits for a slot: its siblings rest until it reports."""
    scheduler = make_scheduler(2, max_num_seqs=4)
    a, b, c = map(make_adapter, "abc")
    beam = make_sequence(20, b)
    scheduler.add(make_sequence(1, a))
    scheduler.add(beam)
    scheduler.update(scheduler.schedule())
    waiting = make_sequence(5, c)
    waiting.num_passed = 1000
    scheduler.add(waiting)
    scheduler.park(beam)
    fork = beam.fork(1, 7)
    scheduler.add(fork)
    newcomer = make_sequence(30, b)
    scheduler.add(newcomer)
    plan = scheduler.schedule()
    assert fork in plan.admitted
    assert waiting.status is newcomer.status is SequenceStatus.WAITING


def test_who_was_aborted_while_it_waited_bars_nobody():
    """It was first, and passed as often as may be; those who come later need not wait for it."""
    scheduler = make_scheduler(1, max_num_seqs=2, preempt_by_priority=True)
    a, b = make_adapter("a"), make_adapter("b")
    running, waiting, next_one = make_sequence(0, a), make_sequence(1, b), make_sequence(2, a)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.update(scheduler.schedule())
    waiting.num_passed = 1000
    scheduler.finish(waiting)
    running.output_token_ids.append(3)
    scheduler.add(next_one)
    assert next_one in scheduler.schedule().admitted


def test_a_sequence_that_has_ended_keeps_no_adapter():
    """Also one that was aborted while it waited, and is still in a queue."""
    scheduler = make_scheduler(1)
    a, b = make_adapter("a"), make_adapter("b")
    for i, adapter in enumerate([a, b, b]):
        scheduler.add(make_sequence(i, adapter))
    [running] = scheduler.schedule().sequences
    form = weakref.ref(b)
    waiting = scheduler._adapters.first()
    del b, adapter
    scheduler.finish(waiting)
    assert form() is not None
    scheduler.finish(scheduler._adapters.first())
    assert form() is None
    scheduler.finish(running)
    assert not scheduler.has_work
