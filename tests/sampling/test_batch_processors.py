"""The engine's own logits processors, in the sampler: what they are told, what fails with them."""

from __future__ import annotations

import gc
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import VOCAB, add, assert_same, logits_of

from quire import BatchChange, LogitsProcessor
from quire.errors import ConfigError, InvalidRequestError
from quire.kernels import get_backend
from quire.sampling.batch_processors import BatchProcessors
from quire.sampling.sampler import Sampler
from quire.sampling_params import SamplingParams

ROWS = 8


class Ban(LogitsProcessor):
    """Forbids the tokens in extra_args, and what the row generated last."""

    def __init__(self) -> None:
        self.banned: dict[int, Any] = {}
        self.num_calls = 0

    def concerns(self, params: SamplingParams) -> bool:
        return params.extra_args is not None

    def update(self, change: BatchChange) -> None:
        for row in change.removed:
            del self.banned[row]
        for added in change.added:
            assert added.row not in self.banned
            self.banned[added.row] = added

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        assert len(set(self.rows)) == len(logits)
        for line, row in zip(logits, self.rows, strict=True):
            added = self.banned[row]
            line[added.params.extra_args["banned"]] = -torch.inf
            line[list(added.output_token_ids[-1:])] = -torch.inf
        return logits


def ban(banned: list[int]) -> Any:
    """The same, as a request's own."""

    def processor(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[banned] = -torch.inf
        logits[token_ids[-1:]] = -torch.inf
        return logits

    return processor


def make(*processors: Any) -> Sampler:
    device = torch.device("cpu")
    return Sampler(
        vocab_size=VOCAB,
        max_num_seqs=ROWS,
        device=device,
        kernels=get_backend(device),
        processors=BatchProcessors(processors),
    )


KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 0.7, "logit_bias": {3: 2.0}, "min_tokens": 2},
    {"use_beam_search": True, "n": 3},
]


@given(st.data())
def test_a_batch_processor_does_what_a_request_s_own_would(data: st.DataObject) -> None:
    """For rows that come and go, in steps of any of them in any order; one call per step."""
    processor = Ban()
    one, other = make(processor), make()
    alive: dict[int, tuple[list[int], list[int], bool]] = {}
    for step in range(data.draw(st.integers(1, 6))):
        for row in data.draw(st.lists(st.sampled_from(range(ROWS)), unique=True)):
            if row in alive:
                one.remove(row)
                other.remove(row)
                del alive[row]
                continue
            kind = dict(data.draw(st.sampled_from(KINDS)))
            banned = data.draw(st.none() | st.lists(st.integers(0, VOCAB - 1), max_size=9))
            both = {"seed": row, "output": list(range(data.draw(st.integers(0, 3))))}
            outputs = [
                add(
                    one,
                    row,
                    **both,
                    **kind,
                    extra_args=None if banned is None else {"banned": banned},
                ),
                add(
                    other,
                    row,
                    **both,
                    **kind,
                    logits_processors=None if banned is None else [ban(banned)],
                ),
            ]
            alive[row] = (outputs[0], outputs[1], banned is not None)
        chosen = data.draw(st.lists(st.sampled_from(sorted(alive)), unique=True)) if alive else []
        if not chosen:
            continue
        rows, logits = np.array(chosen), logits_of(len(chosen), seed=step)
        before, calls = logits.clone(), processor.num_calls
        found, expected = one.sample(logits, rows), other.sample(logits, rows)
        assert torch.equal(logits, before)
        assert found.failures.keys() == expected.failures.keys()
        assert_same(found, expected, list(range(len(chosen))))
        served = any(alive[row][2] for row in chosen)
        assert one.needs_logits(rows) == other.needs_logits(rows)
        assert processor.num_calls - calls == served
        for place, row in enumerate(chosen):
            for output in {id(o): o for o in alive[row][:2]}.values():
                output.append(int(found.token_ids[place]))
    for row in list(alive):
        one.remove(row)
    assert not processor.banned


class Told(LogitsProcessor):
    """Writes down what it is told, and may raise at it."""

    def __init__(self, bad: set[int] | None = None) -> None:
        self.bad = bad or set()
        self.changes: list[BatchChange] = []
        self.alive: set[int] = set()

    def update(self, change: BatchChange) -> None:
        self.changes.append(change)
        assert change.removed or change.added, "nothing to tell"
        for row in change.removed:
            assert row in self.alive, "removed what was not there"
            self.alive.remove(row)
        for added in change.added:
            assert added.row not in self.alive, "added twice"
            self.alive.add(added.row)
        if any(added.prompt_token_ids[0] in self.bad for added in change.added):
            raise LookupError("this prompt will not do")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert set(self.rows) <= self.alive
        return logits


@given(st.lists(st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 5)), max_size=5)))
def test_each_row_that_is_added_is_removed_once(steps: list[list[tuple[int, int]]]) -> None:
    """Whatever comes, goes and fails between two steps; only rows that go wrong alone fail."""
    processor = Told(bad={1, 2})
    sampler = make(processor)
    prompts: dict[int, int] = {}
    for step in steps:
        for row, prompt in step:
            if prompts.pop(row, None) is not None:
                sampler.remove(row)
            else:
                add(sampler, row, prompt=[prompt], temperature=0)
                prompts[row] = prompt
        if not prompts:
            assert not processor.alive
            continue
        rows = np.array(sorted(prompts))
        logits = logits_of(len(rows))
        found = sampler.sample(logits, rows)
        assert processor.alive == set(prompts)
        wrong = {place for place, row in enumerate(rows.tolist()) if prompts[row] in processor.bad}
        assert set(found.failures) == wrong
        assert all("this prompt will not do" in str(error) for error in found.failures.values())
        good = [place for place in range(len(rows)) if place not in wrong]
        assert found.token_ids[good].tolist() == logits[good].argmax(dim=1).tolist()
    sampler.close()
    assert not processor.alive


def test_a_row_that_never_took_a_step_is_not_told_of() -> None:
    """What is told is told before the step that needs it, and all of it at once."""
    processor = Told()
    sampler = make(processor)
    for row in range(4):
        add(sampler, row)
    sampler.remove(0)
    assert not processor.changes
    sampler.sample(logits_of(1), np.array([2]))
    assert [[added.row for added in c.added] for c in processor.changes] == [[1, 2, 3]]
    sampler.remove(2)
    add(sampler, 2, prompt=[9])
    sampler.remove(3)
    sampler.sample(logits_of(1), np.array([2]))
    [_, change] = processor.changes
    assert (change.removed, [added.row for added in change.added]) == ((2, 3), [2])


def test_tokens_are_live_and_cannot_be_changed() -> None:
    """A processor reads the sequence's own lists, also those of tokens to come."""
    processor = Told()
    sampler = make(processor)
    output = add(sampler, 0, prompt=[3, 4], output=[5])
    sampler.sample(logits_of(1), np.array([0]))
    [added] = processor.changes[0].added
    output.append(6)
    assert list(added.prompt_token_ids) == [3, 4]
    assert (list(added.output_token_ids), added.output_token_ids[-1]) == ([5, 6], 6)
    assert (added.output_token_ids[:1], len(added.output_token_ids)) == ([5], 2)
    assert repr(added.output_token_ids) == "[5, 6]"
    with pytest.raises(AttributeError):
        added.output_token_ids.append(7)  # type: ignore[attr-defined]


class Function(LogitsProcessor):
    """Applies a function of one row's number and logits to all rows."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def concerns(self, params: SamplingParams) -> bool:
        return params.extra_args is None

    def update(self, change: BatchChange) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> Any:
        logits += 1.0  # a processor that fails half-way has done something already
        return self.function(self.rows, logits)


def raise_at_1(rows: list[int], logits: torch.Tensor) -> torch.Tensor:
    if 1 in rows:
        raise ZeroDivisionError("nothing to divide by")
    return logits


def nan_at_1(rows: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.tensor(rows)[:, None] == 1, math.nan, logits)


def leave_at_1(rows: list[int], logits: torch.Tensor) -> torch.Tensor:
    if 1 in rows:
        raise SystemExit
    return logits


def none_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return None if 1 in rows else logits


def double_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return logits.double() if 1 in rows else logits


def short_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return logits[:, 1:] if 1 in rows else logits


def dead_end_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return torch.where(torch.tensor(rows)[:, None] == 1, -torch.inf, logits)


def sparse_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return logits.to_sparse() if 1 in rows else logits


def bend_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    return logits.resize_(2, 3) if 1 in rows else logits


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


def unreadable_at_1(rows: list[int], logits: torch.Tensor) -> Any:
    if 1 in rows:
        raise Unreadable
    return logits


BROKEN = [
    (raise_at_1, r"Function\.apply raised ZeroDivisionError: nothing to divide by"),
    (nan_at_1, r"Function\.apply must return a float32 tensor of shape \(1, 50\).* got NaN"),
    (leave_at_1, r"Function\.apply raised SystemExit"),
    (none_at_1, r"must return .* got NoneType"),
    (double_at_1, r"must return .* got float64 of shape \(1, 50\)"),
    (short_at_1, r"must return .* got float32 of shape \(1, 49\)"),
    (sparse_at_1, "must return .* got one of layout torch.sparse_coo"),
    (bend_at_1, r"must return .* got float32 of shape \(2, 3\)"),
    (unreadable_at_1, r"Function\.apply raised Unreadable"),
    (dead_end_at_1, "no token is allowed"),
]


@pytest.mark.parametrize(("function", "message"), BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_goes_wrong_fails_alone(function: Any, message: str, temperature: float) -> None:
    """Others are given what they would have been; those it does not concern are not touched."""
    logits, rows = logits_of(4), np.array([2, 1, 0, 3])
    good, bad = make(Function(lambda rows, logits: logits)), make(Function(function))
    for sampler in (good, bad):
        for row in range(3):
            add(sampler, row, seed=row, temperature=temperature, logprobs=2)
        add(sampler, 3, seed=3, temperature=temperature, logprobs=2, extra_args={})
    undisturbed, disturbed = good.sample(logits, rows), bad.sample(logits, rows)
    assert list(disturbed.failures) == [1]
    assert isinstance(disturbed.failures[1], InvalidRequestError)
    with pytest.raises(InvalidRequestError, match=message):
        raise disturbed.failures[1]
    assert_same(undisturbed, disturbed, [0, 2, 3])


def test_a_processor_cannot_bend_the_logits_of_a_step() -> None:
    """Where it is given all of them: those that it does without are sampled as if it had not."""
    logits = logits_of(2)
    sampler = make(Function(bend_at_1))
    for row in range(2):
        add(sampler, row, temperature=0)
    found = sampler.sample(logits, np.array([0, 1]))
    assert list(found.failures) == [1]
    assert found.token_ids[0] == logits[0].argmax()


def test_a_model_s_nan_is_not_laid_at_a_processor_s_door() -> None:
    """Its row fails by the model's name, and neighbours go on."""
    logits = logits_of(3)
    logits[1, 4] = math.nan
    sampler = make(Function(lambda rows, logits: logits))
    for row in range(3):
        add(sampler, row, temperature=0)
    found = sampler.sample(logits, np.arange(3))
    assert list(found.failures) == [1]
    assert "the model produced NaN logits" in str(found.failures[1])
    assert found.token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=1).tolist()


def test_rows_that_failed_before_are_not_shown() -> None:
    """A processor comes after the request's own, and not for those that these have ended."""
    seen: list[Any] = []

    def note(rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((rows, logits[:, 5].tolist()))
        return logits

    sampler = make(Function(note), Function(note))
    add(sampler, 0, logits_processors=[lambda ids, row: 1 / 0])
    add(sampler, 1, logits_processors=[lambda ids, row: row.fill_(7.0)])
    found = sampler.sample(logits_of(2), np.array([0, 1]))
    assert list(found.failures) == [0]
    assert seen == [([1], [8.0]), ([1], [9.0])]


def test_greedy_rows_are_not_left_to_the_fast_path() -> None:
    """Where a processor concerns a row, its logits are needed; where none does, they are not."""
    sampler = make(Ban())
    add(sampler, 0, temperature=0, extra_args={"banned": [1]})
    add(sampler, 1, temperature=0)
    assert sampler.needs_logits(np.array([0, 1]))
    assert not sampler.needs_logits(np.array([1]))
    sampler.remove(0)
    add(sampler, 0, temperature=0)
    assert not sampler.needs_logits(np.array([0, 1]))


def test_concerns_may_refuse_a_request() -> None:
    """When it is submitted, with its cause; a row that is added all the same fails alone."""

    class Picky(Ban):
        def concerns(self, params: SamplingParams) -> bool:
            return bool((params.extra_args or {})["banned"])

    sampler = make(Picky())
    with pytest.raises(InvalidRequestError, match="Picky refused the request: KeyError: 'banned'"):
        sampler.check(SamplingParams())
    sampler.check(SamplingParams(extra_args={"banned": [1]}))
    add(sampler, 0)
    add(sampler, 1, temperature=0, extra_args={"banned": [1]})
    found = sampler.sample(torch.eye(VOCAB)[[1, 1]], np.array([0, 1]))
    assert list(found.failures) == [0]
    sampler.remove(0)
    sampler.remove(1)


def test_a_removal_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It harms nobody: the row has gone."""

    class Clumsy(Told):
        def update(self, change: BatchChange) -> None:
            if change.removed:
                raise KeyError("not here")

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    sampler = make(Clumsy())
    logger = logging.getLogger("quire")
    logger.addHandler(caplog.handler)
    try:
        add(sampler, 0)
        assert not sampler.sample(logits_of(1), np.array([0])).failures
        sampler.remove(0)
        assert "Clumsy.update raised KeyError: 'not here'" in caplog.text
        add(sampler, 0)
        add(sampler, 1)
        sampler.sample(logits_of(1), np.array([0]))
        sampler.remove(0)
        caplog.clear()
        add(sampler, 0)
        assert not sampler.sample(logits_of(2), np.array([0, 1])).failures
        assert "Clumsy.update raised" in caplog.text
        sampler.remove(0)
        add(sampler, 0)
        assert not sampler.sample(logits_of(1), np.array([0])).failures
    finally:
        logger.removeHandler(caplog.handler)


def test_an_instance_serves_one_engine_at_a_time() -> None:
    """It would mix up their rows; a class is instantiated for each, and closing sets free."""
    processor = Ban()
    first = BatchProcessors([Ban, processor, Ban])
    with pytest.raises(ConfigError, match="this Ban is registered already"):
        BatchProcessors([Ban(), processor])
    with pytest.raises(ConfigError, match="registered already"):
        BatchProcessors([twice := Ban(), twice])
    first.close()
    second = BatchProcessors([processor])
    assert second
    del second
    gc.collect()
    BatchProcessors([processor, Ban]).close()


def test_a_class_that_cannot_be_instantiated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Function\(\) raised TypeError.* give an instance"):
        BatchProcessors([Function])
