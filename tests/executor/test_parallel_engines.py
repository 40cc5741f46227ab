"""An engine of several processes gives what one process gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter

from quire import LLM, LoRARequest, SamplingParams
from quire.errors import AdapterError, ConfigError
from quire.sampling_params import StructuredOutputsParams

PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30] * 40]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=5)
DRAWN = SamplingParams(temperature=1, seed=3, n=3, max_tokens=8, ignore_eos=True)
READ = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., LLM]]:
    """Make engines of tiny models, each once."""
    made: dict[str, LLM] = {}

    def make(name: str, **options: Any) -> LLM:
        key = json.dumps([name, options], sort_keys=True, default=str)
        if key not in made:
            made[key] = LLM(
                tiny_checkpoint(name),
                max_model_len=128,
                num_gpu_blocks_override=64,
                **{"dtype": "float32", **options},
            )
        return made[key]

    yield make
    for llm in made.values():
        llm.close()


def prompts() -> list[Any]:
    return [{"prompt_token_ids": ids} for ids in PROMPTS]


def assert_same(whole: LLM, spread: LLM, params: SamplingParams, **options: Any) -> None:
    """Check tokens, and log-probabilities to 1e-4."""
    ours = spread.generate(prompts(), params, use_tqdm=False, **options)
    theirs = whole.generate(prompts(), params, use_tqdm=False, **options)
    for one, other in zip(ours, theirs, strict=True):
        for mine, right in zip(one.outputs, other.outputs, strict=True):
            assert mine.token_ids == right.token_ids
            for found, expected in zip(mine.logprobs or [], right.logprobs or [], strict=True):
                assert_close(found, expected)
        for found, expected in zip(
            one.prompt_logprobs or [], other.prompt_logprobs or [], strict=True
        ):
            assert_close(found or {}, expected or {})


def assert_close(found: dict, expected: dict) -> None:
    assert {id_: round(each.logprob, 3) for id_, each in found.items()} == pytest.approx(
        {id_: each.logprob for id_, each in expected.items()}, abs=1e-3
    )
    for id_, each in found.items():
        assert each.logprob == pytest.approx(expected[id_].logprob, abs=1e-4)


TWO = {"tensor_parallel_size": 2}
STAGES = {"pipeline_parallel_size": 2}
EXPERTS = {**TWO, "enable_expert_parallel": True}
FOUR = {**TWO, **STAGES}


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        pytest.param("llama", TWO, id="llama-tp"),
        pytest.param("llama", STAGES, id="llama-pp"),
        pytest.param("mixtral", EXPERTS, id="mixtral-ep"),
        pytest.param("falcon-7b", TWO, id="falcon-tp", marks=pytest.mark.slow),
        pytest.param("qwen2", TWO, id="qwen2-tp", marks=pytest.mark.slow),
        pytest.param("gpt2", TWO, id="gpt2-tp", marks=pytest.mark.slow),
        pytest.param("gpt2", STAGES, id="gpt2-pp", marks=pytest.mark.slow),
        pytest.param("mixtral", TWO, id="mixtral-tp", marks=pytest.mark.slow),
        pytest.param("llama", FOUR, id="llama-tp-pp", marks=pytest.mark.slow),
        pytest.param("qwen2-moe", {**EXPERTS, **STAGES}, id="moe-ep-pp", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_what_one_gives(engines, name, spread):
    """Greedy texts, drawn ones, logits of prompts; cold, and from the prefix cache."""
    whole, several = engines(name), engines(name, **spread)
    for params in (GREEDY, GREEDY, DRAWN, READ):
        assert_same(whole, several, params)
    again = several.generate(prompts()[1:], GREEDY, use_tqdm=False)
    assert [output.num_cached_tokens for output in again] == [16, 32]


def test_stages_hand_over_what_they_compute_in_another_type(engines):
    """Where the native kernels do not compute the whole step, as of float16."""
    outputs = [
        llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        for llm in (engines("llama", dtype="float16"), engines("llama", dtype="float16", **STAGES))
    ]
    whole, several = ([each.outputs[0].token_ids for each in made] for made in outputs)
    assert whole == several


def test_structured_outputs_and_embeddings(engines):
    """Masks, forced tokens and pooled states are rank 0's, whoever computed the logits."""
    whole, several = engines("llama"), engines("llama", **TWO)
    constraint = StructuredOutputsParams(regex="(a|b){3}c{4}")
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=constraint)
    texts = [
        [output.outputs[0].text for output in llm.generate(["x", "y"], params, use_tqdm=False)]
        for llm in (whole, several)
    ]
    assert texts[0] == texts[1]
    assert all(text.endswith("cccc") for text in texts[0])
    for llm in (engines("llama", **STAGES), several):
        ours = llm.embed(["some text"], use_tqdm=False)[0].outputs.embedding
        theirs = whole.embed(["some text"], use_tqdm=False)[0].outputs.embedding
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("spread", [TWO, pytest.param(STAGES, marks=pytest.mark.slow)])
def test_adapters_are_on_all_ranks(tiny_checkpoint, tmp_path, engines, spread):
    """Each has its part; one that is let go leaves all of them."""
    folder = tiny_checkpoint("llama")
    requests = []
    for i in range(3):
        path = write_adapter(tmp_path / f"adapter-{i}", folder, seed=i)
        requests.append(LoRARequest(f"adapter-{i}", i + 1, str(path)))
    options = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2}
    whole, several = engines("llama", **options), engines("llama", **options, **spread)
    for request in [*requests, None, requests[0]]:
        assert_same(whole, several, GREEDY, lora_request=request)
    mixed = [requests[0], None, requests[1]]
    assert_same(whole, several, GREEDY, lora_request=mixed)


@pytest.mark.parametrize("quantization", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_codes_are_divided_as_they_are(engines, quantization):
    """Made of whole weights, then divided: no rank has other numbers than one process has."""
    options: dict[str, Any] = {"quantization": quantization, "kv_cache_dtype": "int8"}
    if quantization == "int4":
        options["quantization_config"] = {"group_size": 8}
    whole, several = engines("llama", **options), engines("llama", **options, **TWO)
    ours = several.generate(prompts(), GREEDY, use_tqdm=False)
    theirs = whole.generate(prompts(), GREEDY, use_tqdm=False)
    for one, other in zip(ours, theirs, strict=True):
        first, right = one.outputs[0].logprobs[0], other.outputs[0].logprobs[0]
        assert max(abs(first[id_].logprob - right[id_].logprob) for id_ in first) < 1e-2


def test_what_cannot_be_divided_says_what_can(tiny_checkpoint):
    with pytest.raises(ConfigError, match="tensor_parallel_size=3"):
        LLM(tiny_checkpoint("llama"), tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="pipeline_parallel_size=5"):
        LLM(tiny_checkpoint("llama"), pipeline_parallel_size=5)
    with pytest.raises(ConfigError, match="use 'mp'"):
        LLM(tiny_checkpoint("llama"), tensor_parallel_size=2, distributed_executor_backend="uni")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        LLM(
            tiny_checkpoint("llama"),
            tensor_parallel_size=2,
            distributed_executor_backend="external_launcher",
        )


def test_an_adapter_that_does_not_fit_fails_alone(tiny_checkpoint, tmp_path, engines):
    """The ranks go on."""
    other = write_adapter(tmp_path / "other", tiny_checkpoint("gpt2"))
    several = engines("llama", enable_lora=True, max_loras=2, max_cpu_loras=2, **TWO)
    with pytest.raises(AdapterError):
        several.generate(["x"], GREEDY, lora_request=LoRARequest("other", 9, str(other)))
    assert several.generate(["x"], GREEDY, use_tqdm=False)[0].finished


def test_the_threads_of_this_process_are_its_own_again(tiny_llama):
    """Engines take their share on the thread that steps them, and give it back there."""
    before = torch.get_num_threads()
    for _ in range(2):
        with LLM(tiny_llama, dtype="float32", num_gpu_blocks_override=64, **TWO) as llm:
            llm.generate(["x"], SamplingParams(max_tokens=2), use_tqdm=False)
            assert torch.get_num_threads() == before
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [before]
