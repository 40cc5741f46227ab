"""Logits processors: how they are called, what they may return, and what fails with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from samplers import VOCAB, add, assert_same, logits_of, make

from quire.errors import InvalidRequestError


def test_a_processor_is_called_by_the_number_of_its_arguments() -> None:
    """Two: output and logits. Three: the prompt first. Tokens are lists of its own."""
    calls: list[Any] = []

    def two(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(list(token_ids))
        token_ids.clear()
        return logits

    def three(prompt: list[int], token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append((list(prompt), list(token_ids), logits.dtype, logits.shape))
        prompt.clear()
        return logits

    class Bound:
        def __call__(self, token_ids: Any, logits: torch.Tensor, scale: float = 2.0) -> Any:
            calls.append(scale)
            return logits

    prompt = [3, 4]
    output = [5]
    sampler = make()
    add(sampler, 0, prompt=prompt, output=output, logits_processors=[two, three, Bound()])
    sampler.sample(logits_of(1), np.array([0]))
    assert calls == [[5], ([3, 4], [5], torch.float32, (VOCAB,)), 2.0]
    assert (prompt, output) == ([3, 4], [5])


@pytest.mark.parametrize("processor", [lambda: None, lambda logits: logits, lambda a, b, c, d: d])
def test_a_processor_of_other_arguments_is_refused_when_added(processor: Any) -> None:
    """Before it can do harm; the row stays free."""
    sampler = make()
    with pytest.raises(InvalidRequestError, match="logits_processors must be callable as"):
        add(sampler, 0, logits_processors=[processor])
    add(sampler, 0)


def test_processors_may_change_logits_in_place_or_return_new_ones() -> None:
    """In their order, after the masks, before the penalties; the caller's logits stay."""

    def force(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-torch.inf)
        logits[len(token_ids) + 20] = 0.0
        return logits

    def move(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.roll(logits, 1)

    logits = logits_of(2)
    before = logits.clone()
    sampler = make()
    output = add(sampler, 0, logits_processors=[force, move])
    add(sampler, 1, temperature=0)
    for step in range(3):
        result = sampler.sample(logits, np.array([0, 1]))
        assert result.token_ids.tolist() == [21 + step, int(before[1].argmax())]
        output.append(int(result.token_ids[0]))
    assert torch.equal(logits, before)


def test_a_processor_may_force_a_token_by_infinity() -> None:
    """Logits of +inf leave these tokens alone to be drawn from."""

    def force(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[[11, 12]] = torch.inf
        return logits

    sampler = make()
    for row in range(8):
        add(sampler, row, seed=row, logits_processors=[force], temperature=1.0 if row else 0.0)
    result = sampler.sample(logits_of(8), np.arange(8))
    assert not result.failures
    assert set(result.token_ids.tolist()) == {11, 12}
    assert result.token_ids[0] == 11


def raising(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("nothing to divide by")


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


class Nameless:
    """Has neither a name nor a repr."""

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise Unreadable

    def __repr__(self) -> str:
        raise Unreadable


BROKEN = [
    (raising, "raising raised ZeroDivisionError: nothing to divide by"),
    (lambda token_ids, logits: None, "must return .* got NoneType"),
    (lambda token_ids, logits: logits[:-1], r"must return .*\(50,\).* got .*\(49,\)"),
    (lambda token_ids, logits: logits.double(), "must return .*float32.* got float64"),
    (lambda token_ids, logits: logits * math.nan, "must return .* got NaN"),
    (lambda token_ids, logits: logits.to_sparse(), "must return .* layout torch.sparse_coo"),
    (Nameless(), "of type Nameless raised Unreadable"),
    (lambda token_ids, logits: logits - torch.inf, "no token is allowed"),
]


@pytest.mark.parametrize(("processor", "message"), BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_processor_fails_its_row_alone(
    processor: Any, message: str, temperature: float
) -> None:
    """With a message that says what was wrong; neighbours choose what they would without it."""
    logits = logits_of(3)
    rows = np.array([0, 1, 2])
    sampler = make()
    for row in rows:
        add(sampler, row, seed=int(row), temperature=temperature, logprobs=2)
    undisturbed = sampler.sample(logits, rows)
    sampler.remove(1)
    add(sampler, 1, logits_processors=[processor], temperature=temperature)
    disturbed = sampler.sample(logits, rows)
    assert list(disturbed.failures) == [1]
    failure = disturbed.failures[1]
    assert isinstance(failure, InvalidRequestError)
    with pytest.raises(InvalidRequestError, match=message):
        raise failure
    assert_same(undisturbed, disturbed, [0, 2])


def test_a_processor_that_bends_its_logits_fails_alone() -> None:
    """Into another shape, which shows only when they are put back."""
    sampler = make()
    add(sampler, 0, logits_processors=[lambda ids, logits: logits.resize_(3)])
    add(sampler, 1)
    assert set(sampler.sample(torch.zeros(2, VOCAB), np.array([0, 1])).failures) == {0}


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_processor_that_wants_to_exit_fails_alone(kind: type[BaseException]) -> None:
    def leave(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise kind

    sampler = make()
    add(sampler, 0, logits_processors=[leave])
    add(sampler, 1)
    drawn = sampler.sample(torch.zeros(2, VOCAB), np.array([0, 1]))
    assert set(drawn.failures) == {0}
