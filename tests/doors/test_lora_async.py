"""Adapters of AsyncLLM: read on a thread, so that others go on; otherwise as those of LLM."""

from __future__ import annotations

import asyncio
import threading

import pytest
from adapters import write_adapter

from quire import LLM, AsyncLLM, LoRARequest, SamplingParams
from quire.errors import AdapterError, EngineClosedError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / f"a{seed}", tiny_llama, seed=seed) for seed in range(3)]


@pytest.fixture
def llm(tiny_llama):
    with LLM(tiny_llama, dtype="float32", enable_lora=True, max_loras=2) as llm:
        yield llm


@pytest.fixture
def engine(llm):
    return AsyncLLM.from_llm(llm)


async def tokens(engine, lora_request=None, params=GREEDY):
    async for output in engine.generate(PROMPT, params, lora_request=lora_request):
        last = output
    assert last.lora_request is lora_request
    return list(last.outputs[0].token_ids)


def plain_tokens(llm, lora_request=None):
    [output] = llm.generate(PROMPT, GREEDY, lora_request=lora_request, use_tqdm=False)
    return list(output.outputs[0].token_ids)


async def test_adapters_are_those_of_the_llm(engine, llm, folders):
    """Loaded by one door, they are there by the other; each request has its own."""
    request = await engine.load_lora(folders[0], "x")
    assert await engine.list_loras() == llm.list_loras() == [request]
    adapters = [None, "x", *(LoRARequest("y", lora_path=folder) for folder in folders)]
    got = await asyncio.gather(*(tokens(engine, each) for each in adapters))
    assert got == [plain_tokens(llm, each) for each in adapters]
    assert got[1] == got[2]
    vector = await engine.embed(PROMPT, lora_request="x")
    [same] = llm.embed(PROMPT, lora_request="x", use_tqdm=False)
    assert vector.outputs.embedding == same.outputs.embedding
    [other] = llm.embed(PROMPT, use_tqdm=False)
    assert vector.outputs.embedding != other.outputs.embedding
    await engine.unload_lora("x")
    with pytest.raises(AdapterError, match="loaded are: none") as caught:
        await tokens(engine, "x")
    assert caught.value.request_id
    with pytest.raises(AdapterError):
        await engine.unload_lora("x")
    with pytest.raises(AdapterError):
        await engine.embed(PROMPT, lora_request="x")


@pytest.mark.parametrize("by", ["load", "request"])
async def test_streams_go_on_while_an_adapter_is_read(engine, llm, folders, monkeypatch, by):
    """Reading keeps neither the event loop nor the engine from its other requests."""
    go_on, reading = threading.Event(), threading.Event()
    tools = llm.llm_engine.adapters._tools
    read = tools.read

    def slow(folder):
        reading.set()
        assert go_on.wait(20)
        return read(folder)

    object.__setattr__(tools, "read", slow)
    request = LoRARequest("x", lora_path=folders[1])
    if by == "load":
        waiting = asyncio.ensure_future(engine.load_lora(folders[1], "x"))
    else:
        waiting = asyncio.ensure_future(tokens(engine, request))
    while not reading.is_set():
        await asyncio.sleep(0.005)
    for _ in range(3):
        assert await tokens(engine) == plain_tokens(llm)
    assert await engine.list_loras() == []
    assert not waiting.done()
    go_on.set()
    assert await waiting == (request if by == "load" else plain_tokens(llm, request))


async def test_a_cancelled_request_leaves_nothing(engine, llm, folders):
    """Also when its adapter is still being read."""
    for delay in (0, 0.005, 0.05):
        task = asyncio.ensure_future(
            tokens(
                engine,
                LoRARequest("x", lora_path=folders[0], load_inplace=True),
                SamplingParams(max_tokens=200, ignore_eos=True),
            )
        )
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await tokens(engine) == plain_tokens(llm)
    assert engine.num_unfinished_requests == 0
    assert await engine.count_lora_requests() == {}


async def test_a_closed_engine_says_so(engine, llm, folders):
    llm.close()
    with pytest.raises(EngineClosedError):
        await engine.load_lora(folders[0])
    with pytest.raises(EngineClosedError):
        await engine.list_loras()
    with pytest.raises(EngineClosedError):
        await tokens(engine, LoRARequest("x", lora_path=folders[0]))
