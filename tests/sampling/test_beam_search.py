"""The beam search finds what transformers' ``generate(num_beams=...)`` finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.sampling.beam_search import BeamSearch

VOCAB = 24


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=48,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.6,
    )
    return GPT2LMHeadModel(config).eval()


def next_candidates(
    model: Any, prompt: list[int], search: BeamSearch, count: int, banned: tuple[int, ...] = ()
) -> list[tuple[list[int], list[float]]]:
    input_ids = torch.tensor([prompt + beam.token_ids for beam in search.live])
    with torch.no_grad():
        logprobs = model(input_ids).logits[:, -1].float().log_softmax(dim=-1)
    logprobs[:, list(banned)] = -torch.inf
    top = logprobs.topk(count, dim=-1)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def run(
    model: Any, prompt: list[int], eos: list[int], width: int, min_tokens: int = 0, **options: Any
) -> BeamSearch:
    search = BeamSearch(
        width=width,
        eos_token_ids=set(eos),
        min_tokens=min_tokens,
        **options,
    )
    while not search.done:
        early = len(search.live[0].token_ids) < min_tokens
        before = [list(beam.token_ids) for beam in search.live]
        count = min(VOCAB, width + max(width, len(eos)))
        origins = search.advance(
            next_candidates(model, prompt, search, count, tuple(eos) if early else ())
        )
        assert len(origins) == (0 if search.done else len(search.live))
        for beam, (parent, token_id) in zip(search.live, origins, strict=False):
            assert beam.token_ids == [*before[parent], token_id]
    return search


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("width", "num_return", "eos", "min_tokens"),
    [(2, 1, [3], 0), (3, 3, [3, 11], 0), (4, 2, [], 0), (5, 5, [1, 5, 9, 13, 20], 3)],
)
def test_sequences_and_scores_equal_transformers(
    model: Any,
    length_penalty: float,
    early_stopping: bool | str,
    width: int,
    num_return: int,
    eos: list[int],
    min_tokens: int,
) -> None:
    """Same sequences, same scores, same order, whatever ends the search."""
    for case, max_tokens in enumerate((1, 5, 12)):
        generator = torch.Generator().manual_seed(case)
        prompt = torch.randint(0, VOCAB, (3 + case,), generator=generator).tolist()
        at_least = min(min_tokens, max_tokens)
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=num_return,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=max_tokens,
            min_new_tokens=at_least or None,
            eos_token_id=eos or None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        search = run(
            model,
            prompt,
            eos,
            width,
            min_tokens=at_least,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_tokens=max_tokens,
        )
        results = search.results()
        assert len(results) == num_return
        for row, beam in enumerate(results):
            sequence = expected.sequences[row, len(prompt) :].tolist()
            length = int((expected.beam_indices[row] >= 0).sum())
            assert beam.token_ids == sequence[:length]
            score = beam.score(length_penalty)
            assert score == pytest.approx(expected.sequences_scores[row].item(), abs=1e-4)
            assert beam.cum_logprob == pytest.approx(sum(beam.logprobs))
            assert len(beam.logprobs) == len(beam.token_ids)
            ended = beam.token_ids[-1] in eos
            assert beam.finish_reason == ("stop" if ended else "length")


def make(**options: Any) -> BeamSearch:
    defaults: dict[str, Any] = {
        "width": 2,
        "num_return": 2,
        "length_penalty": 1.0,
        "early_stopping": False,
        "max_tokens": 3,
        "eos_token_ids": {0},
    }
    return BeamSearch(**(defaults | options))


def test_with_a_width_of_the_whole_tree_the_search_is_exhaustive() -> None:
    """With width V ** T every sequence is compared, so the best of all is found."""
    torch.manual_seed(0)
    vocab, steps = 3, 4
    table = torch.randn(vocab**steps * 2, vocab).log_softmax(-1).tolist()

    def logprobs(token_ids: list[int]) -> list[float]:
        place = 0
        for token_id in token_ids:
            place = place * vocab + token_id + 1
        return table[place % len(table)]

    search = make(
        width=vocab**steps, num_return=5, max_tokens=steps, eos_token_ids=set(), length_penalty=0.0
    )
    while not search.done:
        search.advance([(list(range(vocab)), logprobs(beam.token_ids)) for beam in search.live])

    def total(code: int) -> tuple[float, list[int]]:
        ids = [code // vocab**step % vocab for step in range(steps)]
        return sum(logprobs(ids[:at])[ids[at]] for at in range(steps)), ids

    best = sorted((total(code) for code in range(vocab**steps)), reverse=True)[:5]
    assert [beam.token_ids for beam in search.results()] == [ids for _, ids in best]


def test_is_stopped_ends_a_hypothesis_and_gives_its_reason() -> None:
    """A hypothesis on which the caller's stop rule fires goes no further."""
    search = make(is_stopped=lambda ids: "stop!" if ids[-1] == 7 else None, max_tokens=2)
    assert search.advance([([7, 8, 9], [-0.1, -2.0, -3.0])]) == [(0, 8), (0, 9)]
    search.advance([([5], [-1.0]), ([6], [-1.0])])
    best, second = search.results()
    assert (best.token_ids, best.finish_reason, best.stop_reason) == ([7], "stop", "stop!")
    assert (second.token_ids, second.finish_reason, second.stop_reason) == ([8, 5], "length", None)


def test_impossible_continuations_are_passed_over() -> None:
    """A log-probability of -inf never enters a hypothesis; without any other, the search fails."""
    search = make()
    assert search.advance([([4, 5], [-0.5, -math.inf])]) == [(0, 4)]
    assert [beam.token_ids for beam in search.results()] == [[4]]
    with pytest.raises(InvalidRequestError, match="no token is allowed"):
        search.advance([([4, 5], [-math.inf, -math.inf])])


def test_a_search_that_runs_dry_returns_what_it_found() -> None:
    """Fewer results than asked for are all there are, not padding."""
    search = make(early_stopping="never")
    assert search.advance([([0, 4], [-1.0, -2.0])]) == [(0, 4)]
    assert search.advance([([4], [-math.inf])]) == []
    assert search.done
    assert [beam.token_ids for beam in search.results()] == [[0]]


@given(
    width=st.integers(2, 4),
    early_stopping=st.sampled_from([False, True, "never"]),
    length_penalty=st.floats(-2, 2),
    seed=st.integers(0, 2**16),
    max_tokens=st.integers(1, 8),
)
def test_every_search_ends_with_distinct_ranked_results(
    width: int, early_stopping: Any, length_penalty: float, seed: int, max_tokens: int
) -> None:
    """At most max_tokens steps; results are distinct, ordered by score and end where they may."""
    generator = torch.Generator().manual_seed(seed)
    search = make(
        width=width,
        num_return=width,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        max_tokens=max_tokens,
        eos_token_ids={0, 1},
    )
    steps = 0
    while not search.done:
        table = torch.randn(len(search.live), 12, generator=generator).log_softmax(-1)
        top = table.topk(2 * width, dim=-1)
        candidates = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        origins = search.advance(candidates)
        steps += 1
        assert len(origins) <= width
        assert all(beam.finish_reason is None for beam in search.live)
    assert steps <= max_tokens
    results = search.results()
    scores = [beam.score(length_penalty) for beam in results]
    assert len(results) == width or steps == 1
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(beam.token_ids) for beam in results}) == len(results)
    for beam in results:
        assert not {0, 1} & set(beam.token_ids[:-1])
        assert (beam.finish_reason == "stop") == (beam.token_ids[-1] in {0, 1})
