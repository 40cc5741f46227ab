"""Which replica serves a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire import SamplingParams
from quire.engine.request import Request
from quire.replicas.router import MOST_LEAD, Router, choose


@st.composite
def states(draw):
    count = draw(st.integers(1, 6))
    held = draw(st.lists(st.integers(0, 200), min_size=count, max_size=count))
    loads = draw(st.lists(st.none() | st.integers(0, 300), min_size=count, max_size=count))
    if all(load is None for load in loads):
        loads[draw(st.integers(0, count - 1))] = draw(st.integers(0, 300))
    return held, loads


@given(states(), st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
def test_one_that_lives_is_chosen_and_none_is_far_ahead(state, seats, block_size, turn):
    held, loads = state
    chosen = choose(held, loads, seats, block_size=block_size, turn=turn % len(loads))
    assert loads[chosen] is not None
    least = min(load for load in loads if load is not None)
    assert loads[chosen] - least <= MOST_LEAD
    if least < seats:
        assert loads[chosen] < seats
    if loads[chosen] > least:  # then for more of the beginning than any that has less to do
        lighter = [h for h, x in zip(held, loads, strict=True) if x is not None and x == least]
        assert held[chosen] > max(lighter)


@given(states(), st.integers(1, 64))
def test_nothing_known_goes_to_the_least_loaded(state, block_size):
    _, loads = state
    chosen = choose([0] * len(loads), loads, 8, block_size=block_size)
    assert loads[chosen] == min(load for load in loads if load is not None)


def test_the_longest_beginning_wins_while_the_loads_are_even():
    assert choose([0, 3, 7], [0, 0, 0], 8, block_size=16) == 2
    assert choose([0, 3, 7], [0, 0, 1], 8, block_size=16) == 2
    assert choose([0, 0, 1], [0, 0, 2], 8, block_size=16) == 0
    assert choose([9, 3, 0], [None, 0, 0], 8, block_size=16) == 1


def request(tokens: list[int], salt: str | None = None, adapter: str | None = None) -> Request:
    made = Request("1", None, tokens, SamplingParams(), 0, cache_salt=salt)
    if adapter is not None:
        made.adapter = type("Adapter", (), {"digest": adapter})()
    return made


def router(count: int = 3, shares_prefixes: bool = True) -> Router:
    return Router(count, seats=8, block_size=4, shares_prefixes=shares_prefixes)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_equal_beginnings_go_together_while_balanced(names):
    """Idle replicas: where the first went, all of that beginning go."""
    under_test, homes = router(), {}
    for i, name in enumerate(names):
        tokens = [ord(name)] * 8 + [i]
        where = under_test.route(request(tokens), [0, 0, 0])
        assert homes.setdefault(name, where) == where


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.booleans())
def test_loads_stay_within_the_bound(kinds, shares_prefixes):
    under_test, loads = router(shares_prefixes=shares_prefixes), [0, 0, 0]
    for kind in kinds:
        loads[under_test.route(request([kind] * 40), loads)] += 1
        assert max(loads) - min(loads) <= (MOST_LEAD + 1 if shares_prefixes else 1)


def test_salts_and_adapters_are_told_apart():
    under_test = router(4)
    wanted = [
        request([5] * 8),
        request([5] * 8, salt="x"),
        request([5] * 8, adapter="y"),
        request([5] * 8, "x", "y"),
    ]
    homes = [under_test.route(each, [0] * 4) for each in wanted]
    assert sorted(homes) == [0, 1, 2, 3]
    assert [under_test.route(each, [0] * 4) for each in wanted] == homes


def test_what_a_replica_had_is_forgotten_with_it():
    under_test = router(2)
    where = under_test.route(request([5] * 8), [0, 0])
    assert under_test.route(request([5] * 8), [0, 0]) == where
    under_test.forget(where)
    loads: list[int | None] = [0, 0]
    loads[where] = None
    assert under_test.route(request([5] * 8), loads) == 1 - where


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("quire.replicas.router._MOST_KEYS", 10)
    under_test = router(2)
    for i in range(50):
        under_test.route(request([i] * 16), [0, 0])
    assert len(under_test._known) == 10
