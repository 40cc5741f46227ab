"""LLMEngine of the stand-in: requests by name, and what happens to names and parts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.integrations.vllm.async_engine import AsyncLLM
from quire.integrations.vllm.engine_args import AsyncEngineArgs
from quire.integrations.vllm.llm import LLM
from quire.integrations.vllm.llm_engine import LLMEngine
from quire.integrations.vllm.pooling_params import PoolingParams
from quire.integrations.vllm.sampling_params import SamplingParams
from quire.sampling_params import RequestOutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.fixture
def engine(llm: LLM) -> LLMEngine:
    return LLMEngine.of(llm.quire)


def _step_to_the_end(engine: LLMEngine) -> list[Any]:
    found = []
    while engine.has_unfinished_requests():
        time.sleep(0.02)  # several tokens' news in one step
        found += engine.step()
    return found


@pytest.mark.parametrize("n", [1, 2])
def test_deltas_of_a_step_are_joined_where_tokens_repeat(engine: LLMEngine, n: int) -> None:
    params = SamplingParams(
        n=n,
        temperature=1,
        max_tokens=30,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        allowed_token_ids=[7],
    )
    engine.add_request("a", "the", params)
    found = _step_to_the_end(engine)
    for i in range(n):
        parts = [part for output in found for part in output.outputs if part.index == i]
        assert [id_ for part in parts for id_ in part.token_ids] == [7] * 30


def test_the_name_of_an_aborted_request_can_be_used_at_once(engine: LLMEngine) -> None:
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.add_request("a", "the", long)
    engine.abort_request(request_ids=["a"])
    engine.add_request("a", "the", SamplingParams(max_tokens=3, ignore_eos=True))
    ends = [output for output in _step_to_the_end(engine) if output.finished]
    assert [end.outputs[0].finish_reason for end in ends] == ["length"]
    assert [len(end.outputs[0].token_ids) for end in ends] == [3]


def test_a_request_that_an_engine_does_not_take_is_not_waited_for(tiny_llama: Path) -> None:
    with quire.LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=50) as own:
        stepped = LLMEngine.of(own)
        made = own._make_request

        def late(*args: Any, **kwargs: Any) -> Any:
            request = made(*args, **kwargs)
            own.sleep(2)
            return request

        own._make_request = late  # type: ignore[method-assign]
        with pytest.raises(quire.EngineClosedError, match="sleeps"):
            stepped.add_request("a", "the", GREEDY)
        assert stepped.step() == []


def test_what_else_an_engine_is_asked(llm: LLM, engine: LLMEngine) -> None:
    assert engine.get_supported_tasks() == llm.supported_tasks == ("generate", "embed")
    assert engine.collective_rpc("check_health") == [None]
    assert engine.apply_model(lambda model: type(model).__name__) == ["Decoder"]
    engine.reset_mm_cache()
    assert not engine.is_sleeping()
    engine.sleep()
    assert engine.is_sleeping()
    assert engine.wake_up()
    short = {"truncate_prompt_tokens": 1}
    engine.add_request("a", "the quick", GREEDY, tokenization_kwargs=short)
    engine.add_request("b", "the quick", PoolingParams(), tokenization_kwargs=short)
    assert {len(each.prompt_token_ids) for each in _step_to_the_end(engine)} == {1}
    with pytest.raises(quire.NotSupportedError, match="padding"):
        engine.add_request("c", "the", GREEDY, tokenization_kwargs={"padding": True})
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("level", [1, 2])
def test_an_awaited_engine_sleeps_and_wakes(level: int, tiny_llama: Path) -> None:
    async def run() -> None:
        args = AsyncEngineArgs(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=100)
        engine = AsyncLLM.from_engine_args(args)

        async def one(params: SamplingParams) -> str | None:
            async for output in engine.generate("the quick", params, "one"):
                reason = output.outputs[0].finish_reason
            return reason

        try:
            assert await one(GREEDY)
            long = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
            running = asyncio.create_task(one(long))
            while not engine.get_num_unfinished_requests():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            await engine.sleep(level)
            assert await running in ("abort", "length")
            assert await engine.is_sleeping()
            assert engine.is_running
            with pytest.raises(quire.EngineClosedError, match="sleeps"):
                await one(GREEDY)
            await engine.wake_up()
            assert not await engine.is_sleeping()
            assert await one(GREEDY)
            assert await engine.get_supported_tasks() == ("generate", "embed")
            assert await engine.collective_rpc("check_health") == [None]
        finally:
            engine.shutdown()

    asyncio.run(run())
