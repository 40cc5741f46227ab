"""Counter-based random numbers: functions of seed and position, and well spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sampling.random import derive_seed, uniforms

SEEDS = st.integers(0, 2**64 - 1)


def numbers(seed: int, count: int, start: int = 0) -> np.ndarray:
    return uniforms(np.full(count, seed, dtype=np.uint64), np.arange(start, start + count))


@given(seed=SEEDS, start=st.integers(0, 2**31), count=st.integers(1, 20))
def test_a_number_depends_on_seed_and_position_alone(seed: int, start: int, count: int) -> None:
    """Alone or among others; in [0, 1)."""
    together = numbers(seed, count, start)
    assert (together >= 0).all()
    assert (together < 1).all()
    for offset in range(count):
        assert numbers(seed, 1, start + offset)[0] == together[offset]


@pytest.mark.parametrize("by", ["position", "seed", "child"])
def test_numbers_are_uniform_and_uncorrelated(by: str) -> None:
    """Along positions, along adjacent seeds, and along the children of one seed."""
    count = 1 << 16
    if by == "position":
        sample = numbers(1, count)
    elif by == "seed":
        sample = uniforms(np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.int64))
    else:
        seeds = np.array([derive_seed(0, index) for index in range(count)], dtype=np.uint64)
        sample = uniforms(seeds, np.zeros(count, dtype=np.int64))
    observed = np.histogram(sample, bins=256, range=(0, 1))[0]
    statistic = ((observed - count / 256) ** 2 / (count / 256)).sum()
    assert abs(statistic - 255) < 5 * np.sqrt(2 * 255)
    assert abs(sample.mean() - 0.5) < 5 / np.sqrt(12 * count)
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 5 / np.sqrt(count)


def test_derived_seeds_differ() -> None:
    """Samples of a request, requests of an engine, and samples of different requests."""
    derived = {0}
    for request in range(60):
        parent = derive_seed(0, request)
        derived |= {parent, *(derive_seed(parent, sample) for sample in range(60))}
    assert len(derived) == 1 + 60 * 61


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 2**40))
def test_any_integer_is_a_seed(seed: int, index: int) -> None:
    """Taken modulo 2**64, as is."""
    assert 0 <= derive_seed(seed, index) < 2**64
    assert derive_seed(seed, index) == derive_seed(seed % 2**64, index)
