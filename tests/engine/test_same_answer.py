"""A request's answer depends on its own text, parameters and seed, and on nothing around it."""

from __future__ import annotations

import random

import pytest

from quire import LLM, SamplingParams
from quire.errors import ConfigError
from quire.kernels import get_backend

# Every line is a way of running the same requests; the first is the plainest.
WAYS = {
    "alone": {"max_num_seqs": 1},
    "together": {},
    "in chunks of 7": {"max_num_batched_tokens": 7},
    "whole prompts": {"enable_chunked_prefill": False},
    "without prefix cache": {"enable_prefix_caching": False},
    "small blocks": {"block_size": 4},
    "scarce blocks": {"block_size": 4, "num_gpu_blocks_override": 24, "max_model_len": 80},
    "scarce blocks, no cache": {
        "block_size": 4,
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
        "enable_prefix_caching": False,
    },
    "overlapped": {"async_scheduling": True},
    "overlapped, in chunks of 7": {"async_scheduling": True, "max_num_batched_tokens": 7},
    "overlapped, scarce blocks": {
        "async_scheduling": True,
        "block_size": 4,
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
    },
    "scarce blocks, swapped": {
        "swap_space": 0.01,
        "block_size": 4,
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
        "enable_prefix_caching": False,
    },
    "overlapped, scarce blocks, swapped": {
        "async_scheduling": True,
        "swap_space": 0.01,
        "block_size": 4,
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
    },
}


def make_requests() -> tuple[list[dict], list[SamplingParams]]:
    """Prompts of many lengths, some with a common beginning; greedy and seeded parameters."""
    rng = random.Random(0)
    common = [rng.randrange(5, 250) for _ in range(21)]
    prompts, params = [], []
    for i in range(14):
        own = [rng.randrange(5, 250) for _ in range(rng.choice([1, 3, 8, 17, 30]))]
        prompts.append({"prompt_token_ids": common + own if i % 3 else own})
        kind = i % 4
        options = {"max_tokens": rng.choice([1, 5, 20, 26]), "ignore_eos": True}
        if kind == 0:
            options["temperature"] = 0
        else:
            options |= {"temperature": 1.0, "seed": i}
        if kind == 2:
            options |= {"top_k": 20, "top_p": 0.9, "n": 3}
        if kind == 3:
            options |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_p": 0.02}
        params.append(SamplingParams(**options))
    return prompts, params


def answers(llm: LLM) -> list[list[list[int]]]:
    prompts, params = make_requests()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[list(c.token_ids) for c in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def plain_answers(tiny_llama):
    with LLM(tiny_llama, dtype="float32", **WAYS["alone"]) as llm:
        return answers(llm)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_mixtures_of_experts_answer_the_same(tiny_checkpoint, name):
    """Which experts a token has, and what they make of it, depends on no other token."""
    options = {"dtype": "bfloat16", "batch_invariant": True}
    with LLM(tiny_checkpoint(name), **options, **WAYS["alone"]) as llm:
        expected = answers(llm)
    for way in ("together", "in chunks of 7", "scarce blocks"):
        with LLM(tiny_checkpoint(name), **options, **WAYS[way]) as llm:
            assert answers(llm) == expected


@pytest.mark.parametrize("way", WAYS)
def test_answers_do_not_depend_on_how_requests_are_run(tiny_llama, plain_answers, way):
    """Batch size, chunking, caching, block size and preemption change no token."""
    with LLM(tiny_llama, dtype="float32", **WAYS[way]) as llm:
        assert answers(llm) == plain_answers
        if "scarce" in way:
            assert llm.get_metrics()["num_preemptions"] > 0, "nothing was preempted: no test"
        if "swapped" in way:
            assert llm.get_metrics()["num_swapped_in"] > 0, "nothing was swapped: no test"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "mpt", "opt", "phi3-longrope"])
def test_answers_of_other_kinds_of_models_do_not_depend_on_it_either(tiny_checkpoint, name):
    """Windows, ALiBi and learned positions: in chunks, from a cache, and taken up again."""
    folder = tiny_checkpoint(name)
    with LLM(folder, dtype="float32", max_model_len=80, max_num_seqs=1) as llm:
        plain = answers(llm)
    options = {**WAYS["scarce blocks"], **WAYS["in chunks of 7"]}
    with LLM(folder, dtype="float32", **options) as llm:
        assert answers(llm) == plain
        assert answers(llm) == plain
        metrics = llm.get_metrics()
        assert metrics["num_preemptions"] > 0
        assert metrics["num_cached_tokens"] > 0


@pytest.mark.skipif(get_backend("cpu").name != "cpu", reason="the native kernels promise it")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mpt"])
def test_logprobs_have_the_same_bits_however_requests_are_run(isa, tiny_checkpoint, name, dtype):
    """Natively nothing is summed in an order that company, chunks, cache or blocks decide."""

    def logprobs(**options):
        prompts, params = make_requests()
        for each in params:
            each.logprobs = 2
        options = {"max_model_len": 80, **options}
        with LLM(tiny_checkpoint(name), dtype=dtype, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [
            [(step[i].logprob, i) for step, i in zip(c.logprobs, c.token_ids, strict=True)]
            for output in outputs
            for c in output.outputs
        ]

    expected = logprobs(max_num_seqs=1, enable_prefix_caching=False)
    assert logprobs() == expected
    assert logprobs(**WAYS["in chunks of 7"], block_size=4) == expected
    assert logprobs(**WAYS["scarce blocks"]) == expected


def test_the_same_bits_can_be_made_a_condition(tiny_llama):
    """batch_invariant=True runs where it holds, and names what stands against it elsewhere."""
    if get_backend("cpu").name == "cpu":
        LLM(tiny_llama, dtype="bfloat16", batch_invariant=True).close()
    with pytest.raises(ConfigError, match=r"batch_invariant=True .* in float16"):
        LLM(tiny_llama, dtype="float16", batch_invariant=True)
    LLM(tiny_llama, dtype="float16", batch_invariant=False).close()


def test_answers_do_not_depend_on_a_warm_cache(tiny_llama, plain_answers):
    """A second run, which finds its prompts in the prefix cache, gives the same."""
    with LLM(tiny_llama, dtype="float32", block_size=4) as llm:
        assert answers(llm) == plain_answers
        before = llm.get_metrics()["num_cached_tokens"]
        assert answers(llm) == plain_answers
        assert llm.get_metrics()["num_cached_tokens"] > before


def test_unseeded_requests_differ_from_each_other_and_repeat_with_the_run(tiny_llama):
    """Identical prompts and n samples draw differently; a new engine of that seed draws alike."""
    params = SamplingParams(temperature=1.5, max_tokens=12, n=2, ignore_eos=True)

    def run(seed: int) -> list[tuple[int, ...]]:
        with LLM(tiny_llama, dtype="float32", seed=seed) as llm:
            outputs = llm.generate([[7, 8, 9]] * 3, params, use_tqdm=False)
        return [tuple(c.token_ids) for output in outputs for c in output.outputs]

    first = run(0)
    assert len(set(first)) == len(first)
    assert run(0) == first
    assert run(1) != first


def test_blocks_are_all_free_when_nothing_runs(tiny_llama):
    """Finished, preempted and aborted requests leave no block behind."""
    with LLM(tiny_llama, dtype="float32", **WAYS["scarce blocks"]) as llm:
        answers(llm)
        stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True, seed=1))
        next(stream)
        stream.close()
        answers(llm)
        llm.engine_loop.call(lambda engine: engine.check_integrity())
        assert llm.get_metrics()["kv_cache_usage"] == 0
