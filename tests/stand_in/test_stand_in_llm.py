"""LLM of the stand-in behaves where callers of vLLM rely on it."""

from __future__ import annotations

import asyncio
import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.integrations.vllm.async_engine import AsyncLLM
from quire.integrations.vllm.engine_args import (
    NOT_OFFERED,
    WITHOUT_EFFECT,
    AsyncEngineArgs,
    EngineArgs,
    FlexibleArgumentParser,
    as_quire,
)
from quire.integrations.vllm.exceptions import VLLMValidationError
from quire.integrations.vllm.llm import LLM
from quire.integrations.vllm.llm_engine import LLMEngine
from quire.integrations.vllm.metrics import Counter, Gauge
from quire.integrations.vllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)


def test_outputs_have_what_callers_read(llm: LLM) -> None:
    prompts = ["the quick", "What is the capital", "hello", "dog"]
    outputs = llm.generate(prompts, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert all(output.finished for output in outputs)
    assert all(len(output.outputs[0].token_ids) <= 16 for output in outputs)
    params = SamplingParams(
        temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    [output] = llm.generate("the quick brown fox", params, use_tqdm=False)
    [completion] = output.outputs
    assert completion.finish_reason == "length"
    assert completion.stop_reason is None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert completion.logprobs is not None
    total = 0.0
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        assert found[token_id].rank == 1
        assert isinstance(found[token_id].decoded_token, str)
        total += found[token_id].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.num_cached_tokens >= 0
    [stopped] = llm.generate(
        "the quick", SamplingParams(temperature=0, stop_token_ids=[completion.token_ids[0]])
    )
    assert stopped.finished


def test_old_and_new_forms_of_prompts_mean_the_same(llm: LLM) -> None:
    [text] = llm.generate(["the quick brown"], GREEDY, use_tqdm=False)
    ids = text.prompt_token_ids
    forms: list[Any] = [
        {"prompts": [{"prompt_token_ids": ids}]},
        {"prompts": {"prompt_token_ids": ids, "multi_modal_data": None}},
        {"prompts": [{"prompt": "the quick brown"}]},
        {"prompts": None, "prompt_token_ids": [ids]},
        {"prompts": None, "prompt_token_ids": ids},
        {"prompts": ["the quick brown"], "prompt_token_ids": [ids]},
    ]
    for form in forms:
        [found] = llm.generate(sampling_params=GREEDY, use_tqdm=False, **form)
        assert found.outputs[0].token_ids == text.outputs[0].token_ids, form
    kwargs = {"truncate_prompt_tokens": 1}
    [cut] = llm.generate("the quick brown", GREEDY, use_tqdm=False, tokenization_kwargs=kwargs)
    assert len(cut.prompt_token_ids) == 1
    assert llm.generate([], GREEDY) == []
    with pytest.raises(VLLMValidationError, match="prompts is missing"):
        llm.generate()
    with pytest.raises(quire.NotSupportedError, match="multi_modal_data"):
        llm.generate({"prompt": "x", "multi_modal_data": {"image": 1}})
    with pytest.raises(VLLMValidationError, match="not_a_field"):
        llm.generate({"prompt": "x", "not_a_field": 1})
    with pytest.raises(VLLMValidationError, match="2 entries"):
        llm.generate(["x"], GREEDY, prompt_token_ids=[[1], [2]])


def test_chat_beams_and_samples(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    [one] = llm.chat(conversation, GREEDY, use_tqdm=False)
    both = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert [each.outputs[0].text for each in both] == [one.outputs[0].text] * 2
    params = SamplingParams(n=2, frequency_penalty=1.0, min_tokens=2, seed=3)
    [sampled] = llm.generate(["the"], params, use_tqdm=False)
    assert [each.index for each in sampled.outputs] == [0, 1]
    [beams] = llm.beam_search("the", quire.BeamSearchParams(beam_width=2, max_tokens=3))
    assert len(beams.sequences) == 2
    with pytest.raises(VLLMValidationError):
        llm.generate(["the"], SamplingParams(allowed_token_ids=[10**6]))


def test_tokenizer_and_configuration_are_there(llm: LLM, tiny_llama: Path) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert llm.llm_engine.model_config.max_model_len == 256
    assert llm.llm_engine.model_config.hf_config.model_type == "llama"
    assert llm.llm_engine.vllm_config.model_config is llm.llm_engine.model_config
    assert llm.get_world_size() == 1
    assert isinstance(llm.get_default_sampling_params(), SamplingParams)
    found = EngineArgs(model=str(tiny_llama), max_model_len=64).create_model_config()
    assert (found.max_model_len, found.get_vocab_size()) == (64, 304)


def test_numbers(llm: LLM) -> None:
    [embedding] = llm.embed("the quick", use_tqdm=False)
    assert embedding.outputs.hidden_size == 64
    [encoded] = llm.encode("the quick", use_tqdm=False)
    assert encoded.outputs.data.tolist() == pytest.approx(embedding.outputs.embedding)
    scores = llm.score("the quick", ["the quick", "dog"], use_tqdm=False)
    assert scores[0].outputs.score == pytest.approx(1.0, abs=1e-5)
    assert scores[1].outputs.score < 1.0
    with pytest.raises(ValueError, match="ForSequenceClassification"):
        llm.classify("x")
    with pytest.raises(ValueError, match="2 and 3"):
        llm.score(["a", "b"], ["c", "d", "e"])


def test_calls_where_the_model_is(llm: LLM) -> None:
    assert llm.collective_rpc(lambda worker, a, b=0: (worker.rank, a, b), args=(1,)) == [(0, 1, 0)]
    assert llm.collective_rpc("check_health") == [None]
    [names] = llm.apply_model(lambda model: model.weights.names())
    assert any(name.startswith("layers.0.") for name in names)
    with pytest.raises(VLLMValidationError, match="get_model"):
        llm.collective_rpc("_hidden")
    with pytest.raises(ZeroDivisionError):
        llm.collective_rpc(lambda worker: 1 / 0)


def test_metrics_and_profile(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    from quire.integrations.vllm.profiling import Profiler

    profiler = Profiler(llm.quire)
    with pytest.raises(VLLMValidationError, match="no profile"):
        profiler.stop()
    profiler.start("mine")
    with pytest.raises(VLLMValidationError, match="is running"):
        profiler.start()
    before = {metric.name: metric for metric in llm.get_metrics()}
    llm.generate("the", GREEDY, use_tqdm=False)
    profiler.stop()
    after = {metric.name: metric for metric in llm.get_metrics()}
    tokens = "vllm:generation_tokens"
    assert isinstance(after[tokens], Counter)
    assert isinstance(after["vllm:kv_cache_usage_perc"], Gauge)
    assert after[tokens].value > before[tokens].value  # type: ignore[attr-defined]
    [trace] = tmp_path.glob("mine.*.json.gz")
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]


def test_an_engine_that_its_caller_steps(tiny_llama: Path) -> None:
    args = EngineArgs(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=100)
    engine = LLMEngine.from_engine_args(args)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert engine.step() == []
    engine.add_request("a", "the quick", params)
    engine.add_request("b", {"prompt_token_ids": [5, 6, 7]}, params)
    with pytest.raises(VLLMValidationError, match="'a' is in flight"):
        engine.add_request("a", "x", params)
    with pytest.raises(TypeError, match="request_id"):
        engine.add_request(5, "x", params)  # type: ignore[arg-type]
    with pytest.raises(VLLMValidationError):
        engine.add_request("c", [], params)
    ended: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    assert {name: len(each.outputs[0].token_ids) for name, each in ended.items()} == {
        "a": 6,
        "b": 6,
    }
    engine.add_request("a", "the", SamplingParams(max_tokens=200, ignore_eos=True))
    engine.abort_request("a")
    engine.abort_request("unknown")
    while engine.has_unfinished_requests():
        [last] = engine.step()
    assert last.outputs[0].finish_reason in ("abort", "length")
    assert engine.get_num_unfinished_requests() == 0
    del engine.model_executor
    with pytest.raises(quire.EngineClosedError):
        engine.add_request("z", "x", params)
    assert not engine.has_unfinished_requests()


def test_an_engine_that_is_awaited(tiny_llama: Path) -> None:
    async def run() -> list[str]:
        args = AsyncEngineArgs(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=100)
        engine = AsyncLLM.from_engine_args(args)
        try:
            texts = []
            async for output in engine.generate("the quick", GREEDY, "one"):
                assert output.request_id == "one"
                texts.append(output.outputs[0].text)
            async for found in engine.encode("the", None, "two"):
                assert found.outputs.hidden_size == 64
            with pytest.raises(VLLMValidationError):
                async for _ in engine.generate("the", SamplingParams(logit_bias={10**6: 1.0}), "x"):
                    pass
            await engine.abort("one")
            assert engine.is_running
            assert not engine.errored
            assert (await engine.get_model_config()).max_model_len == 256
            assert (await engine.get_tokenizer()).encode("x")
            await engine.check_health()
        finally:
            engine.shutdown()
        assert engine.is_stopped
        return texts

    texts = asyncio.run(run())
    assert texts
    assert all(later.startswith(text) for text, later in pairwise(texts))


def test_arguments_mean_something_or_nothing_or_are_refused(tiny_llama: Path) -> None:
    for name in WITHOUT_EFFECT:
        assert as_quire({name: 3}) == {}
    for name in NOT_OFFERED:
        assert as_quire({name: None}) == {}
    for name in NOT_OFFERED:
        with pytest.raises(quire.NotSupportedError, match=name):
            as_quire({name: 17})
    with pytest.raises(TypeError, match="max_model_len"):
        LLM(str(tiny_llama), max_model_lenn=5)
    with pytest.raises(TypeError, match="did you mean"):
        EngineArgs(model="x", tensor_parallel_siz=2)
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        LLM(str(tiny_llama), tensor_parallel_size=0)
    assert as_quire({"guided_decoding_backend": "guidance:no-fallback"}) == {
        "structured_outputs_backend": "llguidance"
    }
    assert as_quire({"structured_outputs_config": {"backend": "auto"}}) == {}
    with pytest.raises(quire.NotSupportedError, match="nobody"):
        as_quire({"structured_outputs_config": {"backend": "nobody"}})
    assert as_quire({"task": "embed", "runner": "pooling", "convert": "classify"}) == {}


def test_arguments_come_from_a_command_line(tiny_llama: Path) -> None:
    parser = FlexibleArgumentParser()
    parser.add_argument("--prompt", default="x")
    EngineArgs.add_cli_args(parser)
    words = [
        "--model",
        str(tiny_llama),
        "--max_model_len",
        "64",
        "--enforce-eager",
        "--dtype=float32",
    ]
    found = EngineArgs.from_cli_args(parser.parse_args(words))
    assert found.arguments() == {
        "model": str(tiny_llama),
        "max_model_len": 64,
        "enforce_eager": True,
        "dtype": "float32",
    }
    assert found.max_model_len == 64
    assert found.swap_space is None
    with pytest.raises(AttributeError):
        found.nothing  # noqa: B018


def test_odd_prompts_and_options(llm: LLM) -> None:
    one = SamplingParams(temperature=0, max_tokens=1)
    for ids in (np.array([[5, 6], [7, 8]]), [np.array([5, 6]), (7, 8)]):
        outputs = llm.generate(prompt_token_ids=ids, sampling_params=one, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == [[5, 6], [7, 8]]
    for ids in (np.array([5, 6]), (5, 6)):
        [output] = llm.generate(prompt_token_ids=ids, sampling_params=one, use_tqdm=False)
        assert output.prompt_token_ids == [5, 6]
    for wrong in (5, [[5], 6], "abc"):
        with pytest.raises(VLLMValidationError, match="prompt_token_ids"):
            llm.generate(prompt_token_ids=wrong)
    with pytest.raises(quire.NotSupportedError, match="multi_modal_data"):
        llm.generate({"prompt": "a", "multi_modal_data": np.zeros(3)})
    short = {"truncate_prompt_tokens": 1}
    [output] = llm.generate(["the quick"], [None], tokenization_kwargs=short, use_tqdm=False)
    assert len(output.prompt_token_ids) == 1
    with pytest.raises(VLLMValidationError, match="sampling_params"):
        llm.generate("a", {"max_tokens": 1}, tokenization_kwargs=short)
    with pytest.raises(VLLMValidationError, match="tokenization_kwargs"):
        llm.generate("a", one, tokenization_kwargs=[1])  # type: ignore[arg-type]
    for first, second in ((None, "a"), (1, 2), (["a"], [1])):
        with pytest.raises(VLLMValidationError, match="text"):
            llm.score(first, second, use_tqdm=False)
