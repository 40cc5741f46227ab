"""AsyncLLM under strain: too much work, a slow reader, a broken step, a lost device, the end."""

from __future__ import annotations

import asyncio
import time

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.errors import (
    DeviceLostError,
    EngineBusyError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
)
from quire.sampling_params import RequestOutputKind

PROMPT = [5, 6, 7]
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
DELTA = SamplingParams(
    temperature=0, max_tokens=60, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.DELTA
)


async def last(llm, prompt, params, *args):
    return [output async for output in llm.generate(prompt, params, *args)][-1]


async def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


@pytest.fixture
def small(tiny_llama):
    """Two requests at once, one may wait."""
    with AsyncLLM(tiny_llama, dtype="float32", max_num_seqs=2, max_waiting_requests=1) as llm:
        yield llm


async def test_one_request_too_many_is_refused_and_the_others_are_not_harmed(small):
    """The bound counts those that must wait for others, not those for which there is room."""
    tasks = [asyncio.create_task(last(small, PROMPT, LONG, f"r{i}")) for i in range(8)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [r for r in results if isinstance(r, EngineBusyError)]
    served = [r for r in results if not isinstance(r, Exception)]
    assert len(served) >= 3
    assert len(refused) + len(served) == 8
    assert refused
    for error in refused:
        assert "max_waiting_requests=1" in str(error)
        assert 1 <= error.retry_after <= 60
        assert error.request_id.startswith("r")
    assert {tuple(r.outputs[0].token_ids) for r in served} == {
        tuple(served[0].outputs[0].token_ids)
    }
    assert (await last(small, PROMPT, SHORT)).finished
    assert (await small.get_metrics())["num_queued_requests"] == 0


async def test_the_offline_door_has_no_bound(small):
    outputs = await asyncio.to_thread(small._llm.generate, [PROMPT] * 9, SHORT, use_tqdm=False)
    assert len(outputs) == 9


async def test_a_slow_reader_gets_in_few_pieces_what_a_quick_one_gets_in_many(tiny_llama):
    with AsyncLLM(tiny_llama, dtype="float32") as llm:
        quick = [output async for output in llm.generate(PROMPT, DELTA)]
        slow = []
        async for output in llm.generate(PROMPT, DELTA):
            slow.append(output)
            await asyncio.sleep(0.05)
    assert len(slow) < DELTA.max_tokens / 2

    def joined(outputs):
        parts = [output.outputs[0] for output in outputs]
        ids = [i for part in parts for i in part.token_ids]
        logprobs = [entry for part in parts for entry in part.logprobs]
        return ids, "".join(part.text for part in parts), logprobs, parts[-1].finish_reason

    assert joined(slow) == joined(quick)
    assert joined(slow)[0] == [next(iter(entry)) for entry in joined(slow)[2]]


async def test_errors_name_their_request(tiny_llama):
    with AsyncLLM(tiny_llama, dtype="float32") as llm:
        with pytest.raises(InvalidRequestError) as caught:
            await last(llm, [10**9], SHORT, "mine")
        assert caught.value.request_id == "mine"
        task = asyncio.create_task(last(llm, PROMPT, LONG, "other"))
        await until(lambda: llm.num_unfinished_requests == 1)
        llm.close()
        with pytest.raises(EngineClosedError) as closed:
            await task
        assert closed.value.request_id == "other"


async def test_draining_ends_with_the_last_request_and_takes_no_new_one(tiny_llama):
    async with AsyncLLM(tiny_llama, dtype="float32") as llm:
        assert llm.is_ready
        await llm.check_health(timeout=20)
        running = asyncio.create_task(last(llm, PROMPT, LONG))
        await until(lambda: llm.num_unfinished_requests == 1)
        assert not await llm.drain(timeout=0)
        assert not llm.is_ready
        with pytest.raises(EngineClosedError, match="drained"):
            await last(llm, PROMPT, SHORT)
        assert await llm.drain(timeout=60)
        assert (await running).finished
    with pytest.raises(EngineClosedError):
        await llm.check_health()


async def test_a_step_that_breaks_down_half_way_begins_anew(tiny_llama, monkeypatch):
    """Whatever the books were left like: requests fail, and the next get the same answers."""
    with AsyncLLM(tiny_llama, dtype="float32") as llm:
        expected = (await last(llm, PROMPT, SHORT)).outputs[0].token_ids
        engine = llm._llm.llm_engine
        update = engine.scheduler.update

        def break_down(plan):
            update(plan)
            plan.sequences[0].block_ids.pop()  # and who knows what else
            raise RuntimeError("out of luck")

        monkeypatch.setattr(engine.scheduler, "update", break_down)
        results = await asyncio.gather(
            *(last(llm, PROMPT, LONG, name) for name in "abc"), return_exceptions=True
        )
        for name, error in zip("abc", results, strict=True):
            if isinstance(error, Exception):  # a request that came after the break is served
                assert isinstance(error, RequestFailedError)
                assert error.request_id == name
                assert "out of luck" in str(error)
        assert any(isinstance(error, RequestFailedError) for error in results)
        assert (await last(llm, PROMPT, SHORT)).outputs[0].token_ids == expected
        await llm.check_health(timeout=20)
        assert (await llm.get_metrics())["num_restarts"] == 1
        assert (await llm.get_metrics())["kv_cache_usage"] == 0
        llm._llm.engine_loop.call(lambda engine: engine.check_integrity())


async def test_a_forward_that_leaves_the_books_in_disorder_begins_anew(tiny_llama, monkeypatch):
    with AsyncLLM(tiny_llama, dtype="float32") as llm:
        expected = (await last(llm, PROMPT, SHORT)).outputs[0].token_ids
        engine = llm._llm.llm_engine
        forward = engine._runner.forward

        def fail_once(batch):
            monkeypatch.setattr(engine._runner, "forward", forward)
            engine._pool.allocate(1)  # a block that nobody gives back
            raise RuntimeError("out of luck")

        monkeypatch.setattr(engine._runner, "forward", fail_once)
        with pytest.raises(RequestFailedError, match="out of luck"):
            await last(llm, PROMPT, LONG)
        assert (await last(llm, PROMPT, SHORT)).outputs[0].token_ids == expected
        assert (await llm.get_metrics())["num_restarts"] == 1


async def test_a_lost_device_ends_the_engine_and_everybody_is_told(tiny_llama, monkeypatch):
    llm = AsyncLLM(tiny_llama, dtype="float32")
    (await last(llm, PROMPT, SHORT))
    runner = llm._llm.llm_engine._runner

    def lose(batch):
        raise DeviceLostError("it fell off the bus")

    monkeypatch.setattr(runner, "forward", lose)
    results = await asyncio.gather(
        *(last(llm, PROMPT, LONG) for _ in range(3)), return_exceptions=True
    )
    for error in results:
        assert isinstance(error, EngineClosedError)
        assert "fell off the bus" in str(error)
    assert isinstance(llm.engine_error, DeviceLostError)
    assert not llm.is_ready
    with pytest.raises(EngineClosedError, match="fell off the bus"):
        await llm.check_health(timeout=5)
    llm.close()


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_an_embedding_is_the_hidden_state_that_transformers_computes(tiny_llama, pooling):
    """Whole or in chunks, alone or with others, with the prefix cached or not."""
    import torch
    from transformers import AutoModel

    from quire import PoolingParams

    prompts = [[5, 6, 7], list(range(3, 60)), [9]]
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)
    wanted = []
    for ids in prompts:
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        wanted.append({"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling])
    with LLM(
        tiny_llama, dtype="float32", max_num_batched_tokens=16, block_size=8, max_num_seqs=2
    ) as llm:
        for _ in range(2):
            raw = PoolingParams(pooling=pooling, normalize=False)
            for output, vector in zip(llm.embed(prompts, raw, use_tqdm=False), wanted, strict=True):
                got = torch.tensor(output.outputs.embedding)
                assert torch.allclose(got, vector, atol=1e-4)
        cut = PoolingParams(pooling=pooling, dimensions=8)
        [output] = llm.embed([prompts[1]], cut, use_tqdm=False)
        unit = torch.nn.functional.normalize(wanted[1][:8], dim=0)
        assert torch.allclose(torch.tensor(output.outputs.embedding), unit, atol=1e-4)
        for wrong in ({"dimensions": 10**6}, {"dimensions": 0}, {"pooling": "max"}):
            with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
                llm.embed([prompts[0]], PoolingParams(**wrong), use_tqdm=False)


async def test_an_embedding_that_is_awaited_is_the_same(tiny_llama):
    async with AsyncLLM(tiny_llama, dtype="float32") as llm:
        [offline] = llm._llm.embed([PROMPT], use_tqdm=False)
        outputs = await asyncio.gather(*(llm.embed(PROMPT) for _ in range(3)))
        assert {tuple(o.outputs.embedding) for o in outputs} == {tuple(offline.outputs.embedding)}
        assert llm.num_unfinished_requests == 0


async def test_nobody_is_forgotten_when_the_end_of_requests_breaks_down_half_way(
    tiny_llama, monkeypatch
):
    """The first of a failing step's requests is ended, the second one's end raises."""
    with AsyncLLM(tiny_llama, dtype="float32") as llm:
        engine = llm._llm.llm_engine
        finish, ended = engine.scheduler.finish, []

        def finish_one(sequence):
            ended.append(sequence)
            if len(ended) > 1:
                raise RuntimeError("out of luck")
            finish(sequence)

        def fail(batch):
            monkeypatch.undo()
            monkeypatch.setattr(engine.scheduler, "finish", finish_one)
            raise RuntimeError("first")

        both = asyncio.gather(*(last(llm, PROMPT, LONG) for _ in range(2)), return_exceptions=True)
        await until(lambda: llm.num_unfinished_requests == 2)
        monkeypatch.setattr(engine._runner, "forward", fail)
        for error in await asyncio.wait_for(both, 20):
            assert isinstance(error, RequestFailedError)
        assert (await last(llm, PROMPT, SHORT)).finished
