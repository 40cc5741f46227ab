"""Sampler: masks, biases, processors, penalties, log-probabilities and failures, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import VOCAB, add, assert_same, edited_logits, keep, logits_of, make, seen_logits

# ---- masks


def test_allowed_token_ids_are_all_that_is_left() -> None:
    """All others are impossible, and these are as they were."""
    logits = logits_of(1)
    seen = seen_logits(logits, allowed_token_ids=[3, 9, 3])
    assert set(seen.isfinite().nonzero()[:, 0].tolist()) == {3, 9}
    assert torch.equal(seen[[3, 9]], logits[0, [3, 9]])


def test_min_tokens_forbids_every_end_until_there_are_enough() -> None:
    """End-of-sequence and stop tokens alike, from a resumed length too."""
    for length in range(4):
        seen = seen_logits(logits_of(1), min_tokens=2, stop_token_ids=[4], output=[9] * length)
        forbidden = set(seen.isinf().nonzero()[:, 0].tolist())
        assert forbidden == ({0, 4, 7} if length < 2 else set())


def test_bad_words_are_never_completed() -> None:
    """One-token words always; longer ones where the output ends in all but their last token."""
    bad = [[5], [2, 3], [8, 2, 4], [2, 2, 2]]
    for output, forbidden in (
        ([], {5}),
        ([2], {5, 3}),
        ([8, 2], {5, 3, 4}),
        ([2, 2], {5, 3, 2}),
        ([2, 8], {5}),
    ):
        seen = seen_logits(logits_of(1), output=output, bad=bad)
        assert set(seen.isinf().nonzero()[:, 0].tolist()) == forbidden


@given(
    bad=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4),
    seed=st.integers(0, 999),
)
def test_no_generated_text_contains_a_bad_word(bad: list[list[int]], seed: int) -> None:
    """Over whole sequences, whatever the words overlap in."""
    sampler = make(vocab_size=6)
    output = add(sampler, 0, bad=bad, seed=seed)
    for _ in range(12):
        result = sampler.sample(torch.zeros(1, 6), np.array([0]))
        assert not result.failures
        output.append(int(result.token_ids[0]))
    for word in bad:
        assert not any(output[at : at + len(word)] == word for at in range(len(output)))


def test_logit_bias_is_added_after_the_masks() -> None:
    """It cannot bring a forbidden token back; -inf forbids one."""
    logits = logits_of(1)
    seen = seen_logits(
        logits, allowed_token_ids=[1, 2, 3], logit_bias={1: 2.5, 3: -math.inf, 9: 100.0}
    )
    expected = torch.full((VOCAB,), -torch.inf)
    expected[1] = logits[0, 1] + 2.5
    expected[2] = logits[0, 2]
    assert torch.equal(seen, expected)


# ---- penalties


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=30),
    penalties=st.tuples(
        st.sampled_from([0.0, 0.5, -1.0]),
        st.sampled_from([0.0, 0.3, -0.2]),
        st.sampled_from([1.0, 1.3, 0.6]),
    ),
    seed=st.integers(0, 999),
)
def test_penalties_equal_their_definition(
    prompt: list[int], output: list[int], penalties: tuple[float, float, float], seed: int
) -> None:
    """Repetition as transformers has it, over prompt and output; the others over the output."""
    from transformers import RepetitionPenaltyLogitsProcessor

    presence, frequency, repetition = penalties
    logits = logits_of(1, seed).log_softmax(dim=-1)
    expected = RepetitionPenaltyLogitsProcessor(repetition)(
        torch.tensor([prompt + output]), logits.clone()
    )[0]
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB)
    expected = expected - (frequency * counts + presence * (counts > 0))
    found = edited_logits(
        logits,
        prompt=prompt,
        output=output,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    assert torch.allclose(found, expected, atol=2e-6)


@given(st.integers(0, 999))
def test_counts_kept_step_by_step_equal_counts_made_at_once(seed: int) -> None:
    """A sequence that was resumed goes on as one that was never interrupted."""
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.2}
    rows = np.array([0])
    sampler = make()
    output = add(sampler, 0, prompt=[3, 4], seed=seed, **penalties)
    for step in range(40):
        logits = logits_of(1, seed + step)
        token_id = int(sampler.sample(logits, rows).token_ids[0])
        fresh = make()
        add(fresh, 0, prompt=[3, 4], output=list(output), seed=seed, **penalties)
        assert int(fresh.sample(logits, rows).token_ids[0]) == token_id
        output.append(token_id)


def test_penalties_change_what_is_drawn_and_not_the_logprobs() -> None:
    """Log-probabilities are the model's own, before every mask, bias, penalty and temperature."""
    logits = logits_of(2)
    best = int(logits[0].argmax())
    sampler = make()
    add(
        sampler,
        0,
        prompt=[best],
        temperature=0,
        repetition_penalty=50.0,
        logit_bias={3: 5.0},
        allowed_token_ids=[3, 4, best],
        logprobs=4,
    )
    add(sampler, 1, logprobs=1, temperature=0.3)
    result = sampler.sample(logits, np.array([0, 1]))
    assert result.token_ids[0] == 3
    expected = logits.double().log_softmax(dim=1)
    assert result.logprobs is not None
    assert result.logprobs.token_ids.shape == (2, 5)
    assert result.logprobs.token_ids[:, 0].tolist() == result.token_ids.tolist()
    found = result.logprobs.logprobs.double()
    assert torch.allclose(found, expected.gather(1, result.logprobs.token_ids), atol=1e-5)
    assert torch.equal(result.logprobs.token_ids[:, 1:], logits.topk(4, dim=1).indices)
    assert result.logprobs.ranks[0] == (logits[0] > logits[0, 3]).sum() + 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(math.nan, "the model produced NaN logits"), (math.inf, "the model produced infinite logits")],
)
@pytest.mark.parametrize("limits", [{}, {"presence_penalty": 1.0}, {"logits_processors": [keep]}])
def test_a_row_of_broken_logits_fails_alone(
    temperature: float, bad: float, message: str, limits: dict[str, Any]
) -> None:
    """The model is named as the cause, also where masks or processors would come next."""
    rows = np.arange(3)
    logits = logits_of(3)
    sampler = make()
    for row in rows:
        add(sampler, row, seed=int(row), temperature=temperature, **limits)
    undisturbed = sampler.sample(logits, rows)
    logits[1, 17] = bad
    disturbed = sampler.sample(logits, rows)
    assert [str(error) for error in disturbed.failures.values()] == [message]
    assert list(disturbed.failures) == [1]
    assert_same(undisturbed, disturbed, [0, 2])


def test_a_row_without_any_allowed_token_fails_alone() -> None:
    """As when min_tokens forbids the only allowed token."""
    sampler = make()
    add(sampler, 0, allowed_token_ids=[0], min_tokens=1)
    add(sampler, 1, temperature=0)
    result = sampler.sample(logits_of(2), np.array([0, 1]))
    assert list(result.failures) == [0]
    assert "no token is allowed" in str(result.failures[0])


# ---- rows


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([1, 3, 40]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.01, 0.3]),
        "presence_penalty": st.sampled_from([0.5]),
        "repetition_penalty": st.sampled_from([1.5]),
        "logit_bias": st.sampled_from([{1: 2.0, 6: -4.0}]),
        "allowed_token_ids": st.sampled_from([[1, 2, 3, 4, 9]]),
        "min_tokens": st.sampled_from([3]),
        "logprobs": st.sampled_from([0, 2, 5]),
    },
)


@given(
    picks=st.lists(FIELDS, min_size=2, max_size=6),
    seed=st.integers(0, 999),
    steps=st.integers(1, 4),
)
def test_a_sequence_is_the_same_alone_and_among_others(
    picks: list[dict[str, Any]], seed: int, steps: int
) -> None:
    """Whatever else is in the batch, in whatever order and row, tokens and logprobs are equal."""
    count = len(picks)
    batch = make()
    order = np.random.default_rng(seed).permutation(count)
    outputs = [
        add(batch, int(order[i]), prompt=[i, 2], seed=i, **fields) for i, fields in enumerate(picks)
    ]
    alone = [make(rows=1) for _ in picks]
    copies = [
        add(sampler, 0, prompt=[i, 2], seed=i, **fields)
        for i, (sampler, fields) in enumerate(zip(alone, picks, strict=True))
    ]
    for step in range(steps):
        logits = logits_of(count, seed + step)
        together = batch.sample(logits, order)
        for i, sampler in enumerate(alone):
            single = sampler.sample(logits[i : i + 1], np.array([0]))
            assert single.token_ids[0] == together.token_ids[i]
            asked = picks[i].get("logprobs")
            if asked is not None:
                assert single.logprobs is not None
                assert together.logprobs is not None
                for name in ("token_ids", "logprobs"):
                    one = getattr(single.logprobs, name)[0, : asked + 1]
                    assert torch.equal(one, getattr(together.logprobs, name)[i, : asked + 1])
                assert single.logprobs.ranks[0] == together.logprobs.ranks[i]
            outputs[i].append(int(together.token_ids[i]))
            copies[i].append(int(together.token_ids[i]))


def test_seeded_rows_repeat_and_differently_seeded_rows_differ() -> None:
    """Twenty samples of one prompt: each repeats, no two are alike."""

    def run(seed: int) -> list[int]:
        sampler = make()
        output = add(sampler, 0, seed=seed)
        for step in range(12):
            result = sampler.sample(logits_of(1, step), np.array([0]))
            output.append(int(result.token_ids[0]))
        return output

    runs = [run(seed) for seed in range(20)]
    assert runs == [run(seed) for seed in range(20)]
    assert len({tuple(output) for output in runs}) == 20


def test_a_resumed_row_goes_on_where_it_was() -> None:
    """Removing a row and adding it elsewhere with its output, as preemption does, is unseen."""
    whole, broken = make(), make()
    fields = {"temperature": 0.9, "frequency_penalty": 0.3, "seed": 5}
    first = add(whole, 0, **fields)
    second = add(broken, 0, **fields)
    for step in range(10):
        row = step % 3
        first.append(int(whole.sample(logits_of(1, step), np.array([0])).token_ids[0]))
        second.append(int(broken.sample(logits_of(1, step), np.array([row])).token_ids[0]))
        broken.remove(row)
        add(broken, (step + 1) % 3, output=second, **fields)
    assert first == second


def test_a_taken_row_is_not_given_away() -> None:
    """An engine that mixes up its rows hears of it; a freed row has no trace of its past."""
    sampler = make()
    add(sampler, 2, allowed_token_ids=[3], logprobs=1)
    with pytest.raises(ValueError, match="row 2 is taken"):
        add(sampler, 2)
    sampler.remove(2)
    sampler.remove(2)
    add(sampler, 2, temperature=0)
    logits = logits_of(1)
    result = sampler.sample(logits, np.array([2]))
    assert result.token_ids[0] == logits.argmax()
    assert result.logprobs is None


def test_an_empty_batch_is_no_batch() -> None:
    """No rows, no tokens."""
    result = make().sample(torch.empty(0, VOCAB), np.empty(0, dtype=np.int64))
    assert result.token_ids.tolist() == []
    assert not result.failures


def test_half_precision_logits_are_read_in_float32() -> None:
    """bfloat16 in, the same choice as of their float32 values, for every kind of row."""
    logits = logits_of(4).bfloat16()
    tokens = []
    for batch in (logits, logits.float()):
        sampler = make()
        for row, fields in enumerate(
            ({"temperature": 0}, {"top_k": 5}, {"logit_bias": {2: 1.0}}, {"logprobs": 3})
        ):
            add(sampler, row, seed=row, **fields)
        tokens.append(sampler.sample(batch, np.arange(4)).token_ids.tolist())
    assert tokens[0] == tokens[1]


# ---- log-probabilities


def test_rows_that_ask_for_none_cost_none_and_others_get_theirs() -> None:
    """k is the most that was asked for; -1 is the whole vocabulary; best_of needs the token's."""
    logits = logits_of(4)
    sampler = make()
    add(sampler, 0, temperature=0)
    assert sampler.sample(logits[:1], np.array([0])).logprobs is None
    add(sampler, 1, temperature=0, logprobs=0)
    add(sampler, 2, best_of=2, temperature=1.0)
    result = sampler.sample(logits[:3], np.arange(3)).logprobs
    assert result is not None
    assert result.token_ids.shape == (3, 1)
    exact = logits.double().log_softmax(dim=1)
    for row in (1, 2):
        found = float(result.logprobs[row, 0])
        assert found == pytest.approx(float(exact[row, result.token_ids[row, 0]]), abs=1e-5)
    add(sampler, 3, logprobs=-1)
    result = sampler.sample(logits, np.arange(4)).logprobs
    assert result is not None
    assert result.token_ids.shape == (4, VOCAB + 1)
    assert sorted(result.token_ids[3, 1:].tolist()) == list(range(VOCAB))


def test_prompt_logprobs_of_given_tokens() -> None:
    """Of the targets, and of the k likeliest; -1 is all of them."""
    logits = logits_of(5)
    targets = torch.arange(5)
    exact = logits.double().log_softmax(dim=1)
    for k, width in ((0, 1), (3, 4), (-1, VOCAB + 1), (VOCAB + 9, VOCAB + 1)):
        found = make().logprobs_for(logits, targets, k)
        assert found.token_ids.shape == (5, width)
        assert torch.equal(found.token_ids[:, 0], targets)
        assert torch.allclose(found.logprobs.double(), exact.gather(1, found.token_ids), atol=1e-5)


def test_beam_rows_get_enough_continuations_among_other_rows() -> None:
    """Enough to go on with when every end comes first; masked ones are -inf, and no failure."""
    logits = logits_of(3)
    sampler = make()
    add(sampler, 0, temperature=0)
    add(sampler, 1, use_beam_search=True, n=3, stop_token_ids=[1, 2, 3])
    add(sampler, 2, use_beam_search=True, n=2, allowed_token_ids=[0], min_tokens=2)
    result = sampler.sample(logits, np.arange(3))
    assert not result.failures
    assert result.logprobs is not None
    width = 3 + 5
    expected = logits[1].log_softmax(dim=0).topk(width)
    assert torch.equal(result.logprobs.token_ids[1, 1 : width + 1], expected.indices)
    assert torch.allclose(result.logprobs.logprobs[1, 1 : width + 1], expected.values, atol=1e-5)
    assert result.token_ids[0] == logits[0].argmax()
    assert result.logprobs.logprobs[2, 1:].isinf().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e308},
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 5e-324},
        {"logit_bias": {3: 1e308, 4: 1e308}},
        {"logit_bias": {3: 1e308, 4: 1e308}, "temperature": 0.01},
    ],
)
def test_numbers_that_float32_cannot_hold_still_give_a_token(fields: dict[str, Any]) -> None:
    """Without a warning, and without failing the row: a logit of 0 becomes no NaN."""
    sampler = make()
    add(sampler, 0, prompt=[1, 2], output=[3], **fields)
    drawn = sampler.sample(torch.linspace(-3, 3, VOCAB)[None].round(), np.array([0]))
    assert not drawn.failures
    if "logit_bias" in fields:
        assert drawn.token_ids[0] in (3, 4)
