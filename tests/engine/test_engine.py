"""What the engine promises of single requests, and of a request that goes wrong among others."""

from __future__ import annotations

import math

import pytest
import torch

from quire import LLM, RequestFailedError, SamplingParams
from quire.errors import InvalidRequestError

PROMPT = [11, 42, 7, 99, 150, 31, 8, 64, 23, 5, 77]


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapped"])
def llm(tiny_llama, request):
    with LLM(tiny_llama, dtype="float32", block_size=4, async_scheduling=request.param) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def one(llm, prompt=PROMPT, **options):
    options.setdefault("temperature", 0)
    [output] = llm.generate([prompt], SamplingParams(**options), use_tqdm=False)
    return output


def test_greedy_tokens_equal_transformers(llm, oracle):
    """The whole way, from prompt to tokens, gives what transformers' generate gives."""
    wanted = oracle.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    assert list(one(llm, max_tokens=40, ignore_eos=True).outputs[0].token_ids) == wanted


@pytest.mark.parametrize("budget", [3, 64])
def test_logprobs_equal_transformers(tiny_llama, oracle, budget):
    """Logprobs of prompt and output are those of the model's own distribution, chunked or not."""
    with LLM(tiny_llama, dtype="float32", max_num_batched_tokens=budget) as llm:
        one(llm)  # the prompt is in the cache now, and its logprobs must be there all the same
        output = one(
            llm,
            max_tokens=6,
            logprobs=3,
            prompt_logprobs=2,
            ignore_eos=True,
            temperature=0.7,
            seed=3,
            repetition_penalty=1.5,
        )
    ids = PROMPT + list(output.outputs[0].token_ids)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    total = 0.0
    for position, entry in enumerate(entries):
        k = 2 if position < len(PROMPT) - 1 else 3
        chosen = ids[position + 1]
        top = wanted[position].topk(k).indices.tolist()
        assert set(entry) == {chosen, *top}
        for token_id, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(wanted[position, token_id]), abs=1e-4)
            better = int((wanted[position] > wanted[position, token_id]).sum())
            assert logprob.rank == better + 1
            assert isinstance(logprob.decoded_token, str)
        if position >= len(PROMPT) - 1:
            total += entry[chosen].logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_beam_search_equals_transformers(llm, oracle, length_penalty, early_stopping):
    """Forked sequences over shared blocks find the hypotheses that transformers finds."""
    output = one(
        llm,
        n=2,
        best_of=4,
        use_beam_search=True,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=24,
        temperature=0.0,
        logprobs=0,
    )
    eos = list(llm.llm_engine.limits.eos_token_ids)
    wanted = oracle.generate(
        torch.tensor([PROMPT]),
        num_beams=4,
        num_return_sequences=2,
        do_sample=False,
        max_new_tokens=24,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=eos,
        pad_token_id=0,
    )[:, len(PROMPT) :].tolist()
    for completion, tokens in zip(output.outputs, wanted, strict=True):
        ours = list(completion.token_ids)
        assert ours == tokens[: len(ours)]
        assert all(token == 0 for token in tokens[len(ours) :])
    llm.engine_loop.call(lambda engine: engine.check_integrity())


def test_beam_search_survives_scarce_blocks(tiny_llama, llm):
    """Parked beams give way to others and go on with the same result."""
    options = {"n": 3, "use_beam_search": True, "max_tokens": 20, "ignore_eos": True}
    wanted = [list(c.token_ids) for c in one(llm, **options).outputs]
    small = {"block_size": 4, "num_gpu_blocks_override": 14, "max_model_len": 40}
    with LLM(tiny_llama, dtype="float32", **small) as scarce:
        outputs = scarce.generate([PROMPT] * 3, SamplingParams(**options), use_tqdm=False)
        assert scarce.get_metrics()["num_preemptions"] > 0
        scarce.engine_loop.call(lambda engine: engine.check_integrity())
    for output in outputs:
        assert [list(c.token_ids) for c in output.outputs] == wanted


@pytest.mark.parametrize("caching", [True, False])
def test_n_samples_share_the_blocks_of_their_prompt(tiny_llama, caching):
    """n samples compute the full blocks of a prompt once, with or without the prefix cache."""
    prompt = list(range(10, 10 + 41))
    with LLM(tiny_llama, dtype="float32", block_size=4, enable_prefix_caching=caching) as llm:
        one(llm, prompt, temperature=1, n=5, max_tokens=3, ignore_eos=True)
        metrics = llm.get_metrics()
        # 41 tokens are 10 full blocks and one token, which each sample computes for itself;
        # of three new tokens, two are computed.
        assert metrics["num_computed_tokens"] == 41 + 4 * 1 + 5 * 2
        before = metrics["num_cached_tokens"]
        one(llm, prompt, max_tokens=1)
        assert llm.get_metrics()["num_cached_tokens"] - before == (40 if caching else 0)


def test_best_of_returns_the_most_likely_samples(llm):
    """best_of=6 returns the n of its six samples whose cumulative logprob is highest."""
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    all_six = one(llm, n=6, **options).outputs
    best = one(llm, n=2, best_of=6, **options).outputs
    ranked = sorted(all_six, key=lambda c: -c.cumulative_logprob)[:2]
    assert [list(c.token_ids) for c in best] == [list(c.token_ids) for c in ranked]
    assert [c.index for c in best] == [0, 1]


def test_a_failing_processor_fails_its_request_alone(llm):
    """An exception in a logits processor ends its own request; neighbours are as without it."""

    def broken(token_ids, logits):
        if len(token_ids) == 2:
            raise KeyError("my processor")
        return logits

    good = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    bad = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logits_processors=[broken])
    wanted = list(one(llm, max_tokens=9, ignore_eos=True).outputs[0].token_ids)
    results = llm._run([PROMPT, PROMPT, PROMPT], [good, bad, good])
    assert isinstance(results[1], RequestFailedError)
    assert "my processor" in str(results[1])
    for result in (results[0], results[2]):
        assert list(result.outputs[0].token_ids) == wanted
    llm.engine_loop.call(lambda engine: engine.check_integrity())


def test_a_processor_of_wrong_arity_is_refused_before_it_runs(llm):
    """What cannot be called as a logits processor never reaches a step."""
    [result] = llm._run([PROMPT], SamplingParams(logits_processors=[lambda: None]))
    assert isinstance(result, InvalidRequestError)
    assert len(one(llm, max_tokens=2, ignore_eos=True).outputs[0].token_ids) == 2


def test_a_forward_that_raises_fails_the_requests_in_it_and_no_others(tiny_llama, monkeypatch):
    """The engine goes on after a step broke down, with all blocks back."""
    with LLM(tiny_llama, dtype="float32") as llm:
        runner = llm.llm_engine._runner
        forward = runner.forward

        def fail_once(batch):
            monkeypatch.setattr(runner, "forward", forward)
            raise RuntimeError("out of luck")

        monkeypatch.setattr(runner, "forward", fail_once)
        [result] = llm._run([PROMPT], SamplingParams(temperature=0))
        assert isinstance(result, RequestFailedError)
        assert "out of luck" in str(result)
        assert one(llm, max_tokens=3, ignore_eos=True).finished
        llm.engine_loop.call(lambda engine: engine.check_integrity())
        assert llm.get_metrics()["kv_cache_usage"] == 0


@pytest.mark.parametrize("logprobs", [None, 0], ids=["likeliest only", "with logits"])
def test_nan_logits_fail_one_request_and_leave_its_neighbours(tiny_llama, monkeypatch, logprobs):
    """NaN in one row's logits is that request's failure only, whichever way tokens are chosen."""
    with LLM(tiny_llama, dtype="float32", enable_prefix_caching=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=logprobs)
        wanted = list(one(llm, max_tokens=4, ignore_eos=True).outputs[0].token_ids)
        runner = llm.llm_engine._runner
        forward = runner.forward

        def poisoned(batch):
            hidden = forward(batch)
            if hidden.shape[0] == 3:
                hidden[1] = math.nan
            return hidden

        monkeypatch.setattr(runner, "forward", poisoned)
        results = llm._run([PROMPT, PROMPT[:5], PROMPT], params)
        assert isinstance(results[1], RequestFailedError)
        assert "NaN" in str(results[1])
        for result in (results[0], results[2]):
            assert list(result.outputs[0].token_ids) == wanted


def test_priority_lets_a_late_request_overtake(tiny_llama):
    """Under the priority policy a better request displaces worse ones that run already."""
    options = {"scheduling_policy": "priority", "max_num_seqs": 1, "dtype": "float32"}
    with LLM(tiny_llama, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False, priority=[5, 5, 1])
        ends = [output.metrics.finished_time for output in outputs]
        assert ends[2] < ends[0] < ends[1]
        same = {tuple(output.outputs[0].token_ids) for output in outputs}
        assert len(same) == 1


def test_a_salt_keeps_prefixes_apart(llm):
    """Requests of different cache_salt share no blocks; of the same, they do."""
    prompt = {"prompt_token_ids": list(range(100, 140))}
    first = one(llm, {**prompt, "cache_salt": "a"}, max_tokens=1)
    other = one(llm, {**prompt, "cache_salt": "b"}, max_tokens=1)
    again = one(llm, {**prompt, "cache_salt": "a"}, max_tokens=1)
    cached = [output.num_cached_tokens for output in (first, other, again)]
    assert cached == [0, 0, 36]


def test_a_beam_search_without_a_way_on_fails_alone(llm):
    """When masks leave no beam a token, that request fails, and its neighbour does not."""

    def nothing(token_ids, logits):
        return logits.fill_(-math.inf) if token_ids else logits

    dead_end = SamplingParams(n=2, use_beam_search=True, max_tokens=5, logits_processors=[nothing])
    good = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    failed, output = llm._run([PROMPT, PROMPT], [dead_end, good])
    assert isinstance(failed, RequestFailedError)
    assert len(output.outputs[0].token_ids) == 5
    llm.engine_loop.call(lambda engine: engine.check_integrity())
    assert llm.get_metrics()["kv_cache_usage"] == 0


def test_prompts_that_come_together_compute_their_common_beginning_once(tiny_llama):
    """Of prompts in one call, one computes the shared blocks and the others wait for it."""
    common = list(range(10, 10 + 64))
    prompts = [[*common, 100 + i] for i in range(5)]
    with LLM(tiny_llama, dtype="float32", block_size=4, max_num_batched_tokens=48) as llm:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert llm.get_metrics()["num_computed_tokens"] == 64 + 5
