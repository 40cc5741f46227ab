"""Copies of an engine give what one engine gives, whichever serves a request."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from quire import LLM, AsyncLLM, LogitsProcessor, LoRARequest, SamplingParams
from quire.errors import ConfigError, InvalidRequestError, NotSupportedError, RequestFailedError
from quire.sampling_params import RequestOutputKind, StructuredOutputsParams

PROMPTS = [[5 + i, 6, 7, *range(8, 20 + i)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
LONG = SamplingParams(temperature=0, max_tokens=230, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "num_gpu_blocks_override": 96,
    "enable_lora": True,
    "max_loras": 2,
    "max_num_seqs": 16,
}


@pytest.fixture(scope="module")
def one(tiny_llama: Path) -> Iterator[LLM]:
    """An engine."""
    with LLM(tiny_llama, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> Iterator[LLM]:
    """Two copies of it."""
    with LLM(tiny_llama, data_parallel_size=2, **OPTIONS) as llm:
        yield llm


def run(llm: LLM, prompts: list[Any], params: Any, **options: Any) -> list[Any]:
    wanted = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
    return llm.generate(wanted, params, use_tqdm=False, **options)


def tokens(outputs: list[Any]) -> list[Any]:
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]


def idle(llm: LLM) -> None:
    """Check that nothing is left in flight."""
    llm.engine_loop.call(lambda engine: engine.check_integrity())
    assert llm.get_metrics()["num_unfinished_requests"] == 0
    assert llm.llm_engine._loads == [0] * len(llm.llm_engine._loads)


def requests_of(llm: LLM) -> list[float]:
    """Return how many requests each replica has begun."""
    engine = llm.llm_engine
    total = llm.get_metrics()["num_requests"]
    own = engine.own.metrics()["num_requests"]
    return [own, total - own]


def test_greedy_tokens_and_logprobs_are_those_of_one_engine(one, two):
    before = requests_of(two)
    ours, theirs = run(two, PROMPTS, GREEDY), run(one, PROMPTS, GREEDY)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.prompt_token_ids == right.prompt_token_ids
        assert mine.outputs[0].token_ids == right.outputs[0].token_ids
        assert mine.outputs[0].finish_reason == right.outputs[0].finish_reason
        for found, expected in zip(
            mine.outputs[0].logprobs, right.outputs[0].logprobs, strict=True
        ):
            assert found.keys() == expected.keys()
            for id_, each in found.items():
                assert each.logprob == pytest.approx(expected[id_].logprob, abs=1e-4)
                assert (each.rank, each.decoded_token) == (
                    expected[id_].rank,
                    expected[id_].decoded_token,
                )
    after = requests_of(two)
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3]
    assert two.get_metrics()["num_replicas"] == 2
    idle(two)


def test_drawn_texts_do_not_depend_on_who_draws(tiny_llama, one, two):
    """With seeds of their own; n of each; by beams; with prompts' logprobs; of texts."""
    for params in (
        SamplingParams(temperature=1, seed=3, n=3, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=1, seed=4, n=2, best_of=3, max_tokens=8, ignore_eos=True),
        SamplingParams(use_beam_search=True, n=3, max_tokens=6),
        SamplingParams(
            temperature=0, max_tokens=4, bad_words=["a"], stop=["b"], logit_bias={7: 3.0}
        ),
    ):
        prompts = [*PROMPTS[:3], "some text", "another text"]
        ours, theirs = run(two, prompts, params), run(one, prompts, params)
        assert tokens(ours) == tokens(theirs)
        assert [o.prompt for o in ours] == [o.prompt for o in theirs]
        assert [[c.text for c in o.outputs] for o in ours] == [
            [c.text for c in o.outputs] for o in theirs
        ]
    read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    for mine, right in zip(run(two, PROMPTS, read), run(one, PROMPTS, read), strict=True):
        for found, expected in zip(mine.prompt_logprobs, right.prompt_logprobs, strict=True):
            assert (found or {}).keys() == (expected or {}).keys()


def test_grammars_and_their_errors(one, two):
    constraint = StructuredOutputsParams(regex="(a|b){3}c{4}")
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=constraint)
    texts = [[o.outputs[0].text for o in run(llm, ["x", "y", "z"], params)] for llm in (one, two)]
    assert texts[0] == texts[1]
    assert all(text.endswith("cccc") for text in texts[0])
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="root ::= missing"))
    told = []
    for llm in (one, two):
        with pytest.raises(RequestFailedError) as caught:
            run(llm, ["x", "y"], bad)
        told.append(type(caught.value.__cause__))
    assert told[0] is told[1] is InvalidRequestError
    endless = SamplingParams(
        use_beam_search=True, n=2, ignore_eos=True, structured_outputs=constraint
    )
    for llm in (one, two):
        with pytest.raises(InvalidRequestError, match="use_beam_search must be False"):
            run(llm, ["x", "y"], endless)
    idle(two)


def test_embeddings(one, two):
    wanted = [f"text {i}" for i in range(4)]
    ours, theirs = two.embed(wanted, use_tqdm=False), one.embed(wanted, use_tqdm=False)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.outputs.embedding == pytest.approx(right.outputs.embedding, abs=1e-4)


def test_streams(one, two):
    """Deltas make the whole, and cumulative outputs grow to it, of several at a time."""
    whole = [o.outputs[0].text for o in run(one, PROMPTS[:4], GREEDY)]

    async def read(llm: AsyncLLM, prompt: list[int], kind: RequestOutputKind) -> list[str]:
        params = GREEDY.clone()
        params.output_kind = kind
        return [
            output.outputs[0].text
            async for output in llm.generate({"prompt_token_ids": prompt}, params)
        ]

    async def read_all(kind: RequestOutputKind) -> list[list[str]]:
        with AsyncLLM.from_llm(two) as llm:
            return await asyncio.gather(*(read(llm, prompt, kind) for prompt in PROMPTS[:4]))

    deltas = asyncio.run(read_all(RequestOutputKind.DELTA))
    assert ["".join(parts) for parts in deltas] == whole
    growing = asyncio.run(read_all(RequestOutputKind.CUMULATIVE))
    assert [texts[-1] for texts in growing] == whole
    streams = [two.stream({"prompt_token_ids": p}, GREEDY) for p in PROMPTS[:4]]
    assert ["".join(o.outputs[0].text for o in stream) for stream in streams] == whole
    idle(two)


def test_equal_beginnings_find_the_cache_that_has_them(two):
    """One after the other, and after a reset none does."""
    two.reset_prefix_cache()
    beginnings = [[100 + i] * 64 for i in range(4)]
    short = SamplingParams(temperature=0, max_tokens=1)
    first = [run(two, [[*b, 1]], short)[0].num_cached_tokens for b in beginnings]
    again = [run(two, [[*b, 2]], short)[0].num_cached_tokens for b in beginnings]
    assert first == [0] * 4
    assert again == [64] * 4
    both = two.kv_cache_map()
    assert len(both.blocks) == 2 * 95
    half = len(both.blocks) // 2
    assert all(
        any(b.is_cached for b in blocks) for blocks in (both.blocks[:half], both.blocks[half:])
    )
    assert two.reset_prefix_cache() is True
    assert [run(two, [[*b, 3]], short)[0].num_cached_tokens for b in beginnings] == first
    idle(two)


def test_functions_of_this_process_are_called_in_it(one, two):
    seen: list[int] = []

    def favour(ids: list[int], logits: Any) -> Any:
        seen.append(len(ids))
        logits[9] += 100
        return logits

    params = SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True, logits_processors=[favour]
    )
    before = requests_of(two)
    assert tokens(run(two, PROMPTS[:4], params)) == [[[9, 9, 9]]] * 4
    assert seen
    assert requests_of(two) == [before[0] + 4, before[1]]


def test_an_aborted_request_ends_wherever_it_is(two):
    async def abort() -> list[Any]:
        with AsyncLLM.from_llm(two) as llm:
            names = [f"name {i}" for i in range(4)]

            async def last(name: str, prompt: list[int]) -> Any:
                async for output in llm.generate({"prompt_token_ids": prompt}, LONG, name):
                    # Who reads late gets several tokens at a time.
                    if len(output.outputs[0].token_ids) >= 3 and not output.finished:
                        await llm.abort(name)
                return output

            return await asyncio.gather(*map(last, names, PROMPTS[:4]))

    for output in asyncio.run(abort()):
        # All of it may have been there before somebody looked.
        count = len(output.outputs[0].token_ids)
        assert output.outputs[0].finish_reason == ("length" if count == 230 else "abort")
        assert count >= 3
    idle(two)
    # One that nobody reads any more, too.
    streams = [two.stream({"prompt_token_ids": p}, LONG) for p in PROMPTS[:2]]
    for stream in streams:
        next(stream)
        stream.close()
    end = time.monotonic() + 30
    while two.get_metrics()["num_unfinished_requests"] and time.monotonic() < end:
        time.sleep(0.02)
    idle(two)
    assert two.get_metrics()["kv_cache_usage"] == 0


def test_adapters(tiny_llama, tmp_path, one, two):
    """By path and by name; with an adapter's own beginnings; when it is unloaded, nobody has it."""
    folders = [write_adapter(tmp_path / f"adapter-{i}", tiny_llama, seed=i) for i in range(2)]
    wanted = [LoRARequest(f"a{i}", i + 1, str(folder)) for i, folder in enumerate(folders)]
    mixed = [wanted[0], None, wanted[1], wanted[0], None, wanted[1]]
    assert tokens(run(two, PROMPTS, GREEDY, lora_request=mixed)) == tokens(
        run(one, PROMPTS, GREEDY, lora_request=mixed)
    )
    two.load_lora(folders[0], "named")
    outputs = run(two, PROMPTS, GREEDY, lora_request="named")
    assert {o.lora_request for o in outputs} == {"named"}
    assert tokens(outputs) == tokens(run(one, PROMPTS, GREEDY, lora_request=wanted[0]))
    # What lies in the folder now is another one: the name stands for what was loaded.
    shutil.rmtree(folders[0])
    assert tokens(run(two, PROMPTS, GREEDY, lora_request="named")) == tokens(outputs)
    in_memory = two.get_metrics()["num_adapters_in_memory"]
    two.unload_lora("named")
    del outputs
    gc.collect()
    assert two.get_metrics()["num_adapters_in_memory"] == in_memory - 2
    idle(two)


def test_a_folder_that_changed_is_served_by_who_has_what_it_was(tiny_llama, tmp_path, one, two):
    folder = write_adapter(tmp_path / "adapter", tiny_llama, seed=7)
    two.load_lora(folder, "old")
    right = tokens(run(one, PROMPTS, GREEDY, lora_request=LoRARequest("x", 1, str(folder))))
    shutil.rmtree(folder)
    write_adapter(folder, tiny_llama, seed=8)
    before = requests_of(two)
    assert tokens(run(two, PROMPTS, GREEDY, lora_request="old")) == right
    assert requests_of(two)[0] == before[0] + len(PROMPTS)
    assert two.count_lora_requests() == {}
    two.unload_lora("old")
    idle(two)


def test_bad_requests_fail_alone(two):
    with pytest.raises(InvalidRequestError, match=r"max_model_len|positions|tokens"):
        run(two, [[1] * 5000], GREEDY)
    with pytest.raises(ConfigError, match="logits_processors"):
        LLM(two.config.model.model, data_parallel_size=2, logits_processors=[_local_class()])
    with pytest.raises(NotSupportedError, match="external_launcher"):
        LLM(
            two.config.model.model,
            data_parallel_size=2,
            distributed_executor_backend="external_launcher",
        )
    idle(two)


def _local_class() -> type:
    class Local(LogitsProcessor):
        def apply(self, logits: Any) -> Any:
            return logits

        def update(self, change: Any) -> None:
            pass

    return Local


def test_what_keeps_a_replica_from_starting_is_told(tiny_checkpoint: Callable[[str], Path]):
    """And nothing is left of the others."""
    with pytest.raises(ConfigError, match=r"num_gpu_blocks_override|max_model_len"):
        LLM(
            tiny_checkpoint("llama"),
            data_parallel_size=2,
            max_model_len=200,
            num_gpu_blocks_override=3,
        )
