"""What is launched is what is sampled, found out later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import VOCAB, add, assert_same, keep, logits_of, make

from quire.errors import InvalidRequestError, QuireError
from quire.sampling.pending import PendingTokens
from quire.utils.transfers import Download, pack, unpack, upload

FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-9, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([1, 3, 40]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.01, 0.3]),
        "presence_penalty": st.sampled_from([0.5]),
        "frequency_penalty": st.sampled_from([-0.5]),
        "repetition_penalty": st.sampled_from([1.5, 0.5]),
        "logit_bias": st.sampled_from([{1: 2.0, 6: -4.0}, {3: -100.0}]),
        "allowed_token_ids": st.sampled_from([[1, 2, 3, 4, 9], [0, 7]]),
        "min_tokens": st.sampled_from([3]),
        "logprobs": st.sampled_from([0, 2, 5]),
        "bad": st.sampled_from([[[1], [2, 3]]]),
    },
)


@given(
    picks=st.lists(FIELDS, min_size=1, max_size=6),
    seed=st.integers(0, 999),
    spoilt=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
)
def test_what_is_launched_is_what_is_sampled(
    picks: list[dict[str, Any]], seed: int, spoilt: float | None
) -> None:
    """Tokens, log-probabilities and failures, whatever rows ask for, step by step."""
    count = len(picks)
    rows = np.random.default_rng(seed).permutation(count)
    one, other = make(), make()
    outputs = [
        add(sampler, int(rows[i]), prompt=[i, 2], seed=i, **fields)
        for sampler in (one, other)
        for i, fields in enumerate(picks)
    ]
    assert one.can_launch(rows)
    for step in range(3):
        logits = logits_of(count, seed + step)
        if spoilt is not None and step == 1:
            logits[0] = spoilt
        expected = one.sample(logits.clone(), rows)
        pending = other.launch(logits, rows)
        found = pending.collect()
        assert {i: str(error) for i, error in expected.failures.items()} == {
            i: str(error) for i, error in found.failures.items()
        }
        good = [i for i in range(count) if i not in expected.failures]
        assert_same(expected, found, good)
        assert found.token_ids.dtype == expected.token_ids.dtype
        assert (found.token_ids[list(found.failures)] == 0).all()
        assert (expected.logprobs is None) == (found.logprobs is None)
        assert pending.token_ids[good].tolist() == expected.token_ids[good].tolist()
        assert ((pending.token_ids >= 0) & (pending.token_ids < VOCAB)).all()
        for i in range(2 * count):
            outputs[i].append(int(expected.token_ids[i % count]))


def test_an_empty_batch_is_launched() -> None:
    """No rows are no error."""
    pending = make().launch(torch.empty(0, VOCAB), np.empty(0, dtype=np.int64))
    assert len(pending.token_ids) == len(pending.collect().token_ids) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"use_beam_search": True, "n": 2},
        {"logits_processors": [keep]},
        {"repetition_penalty": 1e-30},
    ],
)
def test_what_the_host_must_look_at_is_not_launched(fields: dict[str, Any]) -> None:
    """It is known beforehand, of just the rows that are asked about, until they are free again."""
    sampler = make()
    add(sampler, 0, temperature=0)
    add(sampler, 1, **fields)
    assert sampler.can_launch(np.array([0]))
    assert not sampler.can_launch(np.array([0, 1]))
    with pytest.raises(ValueError, match="while the host waits"):
        sampler.launch(logits_of(2), np.array([0, 1]))
    sampler.remove(1)
    assert sampler.can_launch(np.array([0, 1]))


def test_a_row_with_a_grammar_is_not_launched() -> None:
    """Its mask comes with the step."""
    from quire.sampling_params import SamplingParams

    sampler = make()
    sampler.add(
        0,
        SamplingParams(),
        seed=0,
        prompt_token_ids=[1],
        output_token_ids=[],
        eos_token_ids=[0],
        masked=True,
    )
    assert not sampler.can_launch(np.array([0]))


def test_failures_are_found_when_the_tokens_are_collected() -> None:
    """Until then there is a token; what the device goes on with is left as it is."""
    sampler = make()
    add(sampler, 0, temperature=0)
    add(sampler, 1, allowed_token_ids=[0], min_tokens=2)
    logits = logits_of(2)
    logits[0, 5] = torch.nan
    pending = sampler.launch(logits, np.array([0, 1]))
    before = pending.token_ids.tolist()
    failures = pending.collect().failures
    assert isinstance(failures[0], QuireError)
    assert isinstance(failures[1], InvalidRequestError)
    assert pending.token_ids.tolist() == before


def test_the_likeliest_tokens_are_pending_too() -> None:
    """Where no logits were made: a row without any finite one fails."""
    pending = PendingTokens.of_likeliest(
        torch.tensor([4, 2, 3]), torch.tensor([1.0, torch.nan, torch.inf])
    )
    found = pending.collect()
    assert found.token_ids.tolist() == [4, 0, 0]
    assert pending.token_ids.tolist() == [4, 2, 3]
    messages = [str(found.failures[i]) for i in (1, 2)]
    assert messages == ["the model produced NaN logits", "the model produced infinite logits"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([np.int64, np.float32, np.float64, np.int32, np.bool_]),
            st.sampled_from([(0,), (1,), (7,), (3, 5), (0, 4)]),
        ),
        max_size=5,
    )
)
def test_arrays_travel_together(shapes: list[tuple[Any, tuple[int, ...]]]) -> None:
    """In one transfer, each as it was; on a CPU there is none."""
    arrays = [
        (np.arange(np.prod(shape)).reshape(shape) % 5).astype(dtype) for dtype, shape in shapes
    ]
    packed = torch.empty(sum(array.nbytes + 16 for array in arrays), dtype=torch.uint8)
    pack(arrays, packed)
    for found in (unpack(packed, arrays), upload(arrays, torch.device("cpu"))):
        for array, tensor in zip(arrays, found, strict=True):
            assert torch.equal(torch.from_numpy(array), tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_arrays_travel_there_and_back() -> None:
    """To a device and to the host again."""
    arrays = [np.arange(5), np.array([[1.5, 2.5]], dtype=np.float32)]
    there = upload(arrays, torch.device("cuda"))
    for array, tensor in zip(arrays, Download([each + 1 for each in there]).wait(), strict=True):
        assert torch.equal(torch.from_numpy(array + 1), tensor)
