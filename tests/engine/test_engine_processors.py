"""Logits processors of an engine and of its requests, in batches that change."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, BatchChange, LogitsProcessor, SamplingParams
from quire.errors import ConfigError, EngineClosedError, InvalidRequestError, RequestFailedError

OPTIONS = {"dtype": "float32", "block_size": 4, "max_model_len": 80}
SCARCE = {"num_gpu_blocks_override": 24}


class Rule(LogitsProcessor):
    """Of the tokens that extra_args["rule"] names, none twice in a row; books that must balance."""

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}
        self.num_added = self.num_removed = self.num_calls = 0

    def concerns(self, params: SamplingParams) -> bool:
        return "rule" in (params.extra_args or {})

    def update(self, change: BatchChange) -> None:
        for row in change.removed:
            del self.alive[row]
        for added in change.added:
            assert added.row not in self.alive
            self.alive[added.row] = added
        self.num_removed += len(change.removed)
        self.num_added += len(change.added)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        for line, row in zip(logits, self.rows, strict=True):
            added = self.alive[row]
            line.copy_(follow_rule(added.params.extra_args["rule"], added.output_token_ids, line))
        return logits


def follow_rule(modulus: int, token_ids: Any, logits: torch.Tensor) -> torch.Tensor:
    last = token_ids[-1] if len(token_ids) else 0
    logits[last % modulus :: modulus] = -torch.inf
    logits[5:9] += 1.0
    return logits


def make_params(i: int, *, own: bool) -> SamplingParams:
    """Requests of every kind, with the rule as the engine's or as the request's own."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": i, "n": 3},
        {"temperature": 0, "structured_outputs": {"regex": "[a-d ]{3,20}"}},
        {"use_beam_search": True, "n": 3},
        {"temperature": 1.0, "seed": i, "repetition_penalty": 1.2, "logprobs": 1},
        {"temperature": 0, "min_tokens": 4, "logit_bias": {8: -2.0}},
    ]
    rule: dict[str, Any] = {"extra_args": {"rule": 2 + i % 3}}
    if own:
        modulus = 2 + i % 3
        rule = {"logits_processors": [lambda ids, logits: follow_rule(modulus, ids, logits)]}
    if i % 5 == 4:
        rule = {}  # neighbours that it does not concern
    ends = {} if i % 6 == 2 else {"ignore_eos": True}
    return SamplingParams(max_tokens=[26, 9, 20][i % 3], **kinds[i % 6], **rule, **ends)


def answers(llm: LLM, *, own: bool = False) -> list[Any]:
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13 + i % 4] for i in range(15)]
    params = [make_params(i, own=own) for i in range(15)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny_llama: Any) -> Any:
    """By the requests' own processors, one after another."""
    with LLM(tiny_llama, max_num_seqs=4, **OPTIONS) as llm:
        found = answers(llm, own=True)
    for i, outputs in enumerate(found):
        if i % 5 != 4:
            modulus = 2 + i % 3
            assert all((a - b) % modulus for o in outputs for a, b in pairwise(o))
    return found


WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "one at a time": {"max_num_seqs": 1},
    "in chunks": {"max_num_batched_tokens": 7},
    "without prefix cache": {"enable_prefix_caching": False},
    "scarce blocks": SCARCE,
}


@pytest.mark.parametrize("way", WAYS)
def test_one_call_for_all_rows_does_what_one_for_each_would(
    tiny_llama: Any, expected: Any, way: str
) -> None:
    """Mixed batches, n, beams, grammars, preemption: same tokens; who was added was removed."""
    rule = Rule()
    with LLM(tiny_llama, logits_processors=[rule], **{**OPTIONS, **WAYS[way]}) as llm:
        assert answers(llm) == expected
        assert not rule.alive
        assert rule.num_added == rule.num_removed >= 12
        metrics = llm.get_metrics()
        if way == "together":
            assert rule.num_calls < metrics["num_generation_tokens"] / 3
        if way == "scarce blocks":
            assert metrics["num_preemptions"] > 0
        assert answers(llm) == expected  # with a warm cache


@pytest.fixture
def watched(tiny_llama: Any) -> Any:
    rule = Rule()
    with LLM(tiny_llama, logits_processors=[rule], **OPTIONS) as llm:
        yield llm, rule


def test_aborted_requests_are_removed(watched: Any) -> None:
    """Also those that are left half-way; an engine without requests holds no row."""
    llm, rule = watched
    params = SamplingParams(max_tokens=60, ignore_eos=True, extra_args={"rule": 2}, seed=1, n=2)
    stream = llm.stream([5, 6, 7], params)
    next(stream)
    assert rule.alive
    stream.close()
    answers(llm)
    llm.engine_loop.call(lambda engine: engine.check_integrity())
    assert not rule.alive
    assert rule.num_added == rule.num_removed > 0


def test_requests_that_concern_no_processor_do_not_call_it(watched: Any) -> None:
    """They cost what they cost without it."""
    llm, rule = watched
    llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert rule.num_calls == rule.num_added == 0


class Fragile(Rule):
    """Raises, at whatever it is asked to raise at."""

    def concerns(self, params: SamplingParams) -> bool:
        if (params.extra_args or {}).get("bad") == "concerns":
            raise ValueError("not like this")
        return super().concerns(params)

    def update(self, change: BatchChange) -> None:
        super().update(change)
        for added in change.added:
            if added.params.extra_args.get("bad") == "update":
                raise ValueError("not like this")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row in self.rows:
            added = self.alive[row]
            if added.params.extra_args.get("bad") == "apply" and len(added.output_token_ids) > 2:
                raise ValueError("not like this")
        return super().apply(logits)


@pytest.mark.parametrize("where", ["concerns", "update", "apply"])
def test_what_raises_fails_its_request_alone(tiny_llama: Any, expected: Any, where: str) -> None:
    """Its neighbours end as without it, and so do those that come later."""
    fragile = Fragile()
    good = [make_params(i, own=False) for i in range(15)]
    bad = SamplingParams(max_tokens=9, ignore_eos=True, n=2, extra_args={"rule": 2, "bad": where})
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13 + i % 4] for i in range(15)]
    with LLM(tiny_llama, logits_processors=[fragile], **OPTIONS) as llm:
        results = llm._run([*prompts[:7], [5, 6, 7], *prompts[7:]], [*good[:7], bad, *good[7:]])
        failed = results.pop(7)
        assert isinstance(failed, (RequestFailedError, InvalidRequestError))
        assert "ValueError: not like this" in str(failed)
        assert [[list(c.token_ids) for c in output.outputs] for output in results] == expected
        assert not fragile.alive
        assert answers(llm) == expected
        llm.engine_loop.call(lambda engine: engine.check_integrity())


def test_a_grammar_has_the_last_word(tiny_llama: Any) -> None:
    """A token that a processor raises to infinity is not taken where the grammar forbids it."""

    class Push(Rule):
        def concerns(self, params: SamplingParams) -> bool:
            return True

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            logits[:, 10:20] = torch.inf
            return logits

    with LLM(tiny_llama, logits_processors=[Push], **OPTIONS) as llm:
        params = SamplingParams(max_tokens=20, seed=3, structured_outputs={"regex": "[x-z]{4}"})
        [output] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert set(output.outputs[0].text) <= set("xyz")
        assert len(output.outputs[0].text) == 4


def test_the_documents_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A banned answer is not given, and a neighbour's is."""
    text = (Path(__file__).parents[2] / "core_engine" / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    scope["llm"].close()
    free, banned = capsys.readouterr().out.splitlines()[:2]
    assert "Paris" in free
    assert "Paris" not in banned


def test_an_engine_lets_its_processors_go(tiny_llama: Any) -> None:
    """What was in flight is removed when it is closed; the instance then serves another."""
    rule = Rule()
    with pytest.raises(ConfigError) as kept:
        LLM(tiny_llama, logits_processors=[rule], block_size=1, num_gpu_blocks_override=2)
    llm = LLM(tiny_llama, logits_processors=[rule], **OPTIONS)
    assert kept.value.__traceback__ is not None  # an attempt that failed has no hold on it
    with pytest.raises(ConfigError, match="Rule is registered already"):
        LLM(tiny_llama, logits_processors=[rule], **OPTIONS)
    params = SamplingParams(max_tokens=60, ignore_eos=True, extra_args={"rule": 2}, seed=1)
    stream = llm.stream([5, 6, 7], params)
    next(stream)
    llm.close()
    with pytest.raises(EngineClosedError):
        list(stream)
    assert rule.num_added == rule.num_removed > 0
    with LLM(tiny_llama, logits_processors=[rule], **OPTIONS) as other:
        assert answers(other)


class PerSequence:
    """Allows one token more each time: state that the sequences of a request must not share."""

    def __init__(self) -> None:
        self.num_made = 0

    def for_sequence(self) -> Any:
        self.num_made += 1
        calls: list[int] = []

        def processor(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            missed = len(token_ids) - len(calls)  # those of before it was made
            assert missed == 0 or not calls
            calls.extend([0] * (missed + 1))
            logits[10 + len(calls) :] = -torch.inf
            logits[: 8 + len(calls)] = -torch.inf
            return logits

        return processor


@pytest.mark.parametrize("options", [{}, SCARCE])
def test_each_sequence_has_a_callable_of_its_own(tiny_llama: Any, options: Any) -> None:
    """Of n completions and of requests that share parameters; again after preemption."""
    stateful = PerSequence()
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True, n=3, seed=seed, logits_processors=[stateful])
        for seed in range(4)
    ]
    with LLM(tiny_llama, **OPTIONS, **options) as llm:
        outputs = llm.generate([[5 + i, 6, 7] for i in range(4)], params, use_tqdm=False)
        preempted = llm.get_metrics()["num_preemptions"]
    for output in outputs:
        for completion in output.outputs:
            steps = enumerate(completion.token_ids)
            assert all(token in (9 + step, 10 + step) for step, token in steps)
    assert bool(preempted) == bool(options)
    assert 12 <= stateful.num_made <= 12 + preempted


def test_a_factory_that_goes_wrong_fails_its_request_alone(tiny_llama: Any) -> None:
    """Whatever it raises or returns, and whatever the arguments of what it returns."""

    class Factory:
        def __init__(self, make: Any) -> None:
            self.for_sequence = make

    cases = {
        "for_sequence raised ZeroDivisionError": lambda: 1 / 0,
        "for_sequence must return a callable, got int": lambda: 3,
        "must be callable as": lambda: lambda token_ids: token_ids,
    }
    params = [
        SamplingParams(temperature=0, max_tokens=5, logits_processors=[Factory(make)])
        for make in cases.values()
    ]
    plain = SamplingParams(temperature=0, max_tokens=5)
    with LLM(tiny_llama, **OPTIONS) as llm:
        [expected] = llm.generate([[5, 6, 7]], plain, use_tqdm=False)
        *failed, output = llm._run([[5, 6, 7]] * 4, [*params, plain])
    for message, error in zip(cases, failed, strict=True):
        assert message in str(error)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids  # type: ignore[union-attr]
