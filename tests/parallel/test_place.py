"""Ranks and stages: every rank has a place of its own, every layer a stage."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.parallel.place import WHOLE, Place

SIZES = st.integers(1, 9)


@given(tensor_size=SIZES, num_stages=SIZES)
def test_every_rank_has_one_place(tensor_size: int, num_stages: int) -> None:
    places = [
        Place.of_rank(rank, tensor_size, num_stages) for rank in range(tensor_size * num_stages)
    ]
    assert [each.rank for each in places] == list(range(len(places)))
    assert {each.size for each in places} == {len(places)}
    assert len({(each.tensor_rank, each.stage) for each in places}) == len(places)
    assert [each for each in places if each.is_first_stage] == places[:tensor_size]
    assert [each for each in places if each.is_last_stage] == places[-tensor_size:]
    assert all(each.is_whole == (len(places) == 1) for each in places)


@given(num_layers=st.integers(1, 100), num_stages=SIZES)
def test_stages_share_the_layers_evenly(num_layers: int, num_stages: int) -> None:
    """In order, without a gap, and none has two more than another."""
    stages = [
        Place(stage=each, num_stages=num_stages).layers(num_layers) for each in range(num_stages)
    ]
    assert stages[0].start == 0
    assert stages[-1].stop == num_layers
    assert all(one.stop == other.start for one, other in pairwise(stages))
    lengths = [len(each) for each in stages]
    assert max(lengths) - min(lengths) <= 1


def test_a_model_on_one_rank_is_whole() -> None:
    assert WHOLE.is_whole
    assert Place() == WHOLE
    assert WHOLE.layers(7) == range(7)


@pytest.mark.parametrize("wrong", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 1, 1, 1), (0, 1, -1, 2)])
def test_there_is_no_place_outside(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"is .* of"):
        Place(*wrong)
