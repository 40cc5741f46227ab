"""AsyncLLM: cancellation, many event loops, names of requests, and the end of its life."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from quire import AsyncLLM
from quire.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from quire.sampling_params import RequestOutputKind, SamplingParams

DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def tokens(count, **kwargs):
    return SamplingParams(max_tokens=count, **kwargs)


async def collect(llm, prompt, params, *args, **kwargs):
    return [output async for output in llm.generate(prompt, params, *args, **kwargs)]


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


async def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


@pytest.fixture
def async_llm(llm):
    return AsyncLLM.from_llm(llm)


async def test_outputs_are_of_the_kind_that_was_asked_for(async_llm):
    assert texts(await collect(async_llm, "ab", tokens(3))) == ["a", "ab", "aba"]
    deltas = texts(await collect(async_llm, "ab", tokens(3, output_kind=DELTA)))
    assert "".join(deltas) == "aba"
    assert texts(await collect(async_llm, [97], tokens(3, output_kind=FINAL))) == ["aaa"]
    outputs = await collect(async_llm, {"prompt": "ab"}, None)
    assert outputs[-1].finished
    assert len(outputs) == SamplingParams().max_tokens


async def test_tasks_join_one_running_batch(async_llm, engine):
    """Requests made while a step is held all run in the next one."""
    with engine.held():
        tasks = [
            asyncio.create_task(collect(async_llm, c, tokens(4, output_kind=DELTA)))
            for c in "abcdef"
        ]
        await until(lambda: len(async_llm._in_flight) == 6)
    results = await asyncio.gather(*tasks)
    assert ["".join(texts(result)) for result in results] == [c * 4 for c in "abcdef"]
    assert max(engine.batch_sizes) >= 5


@pytest.mark.parametrize(
    ("prompt", "params", "name", "message"),
    [
        ("", None, None, "the prompt is empty"),
        ([], None, None, "the prompt is empty"),
        (["a", "b"], None, None, "one prompt is taken here"),
        ("a", {"n": 1}, None, "must be a SamplingParams"),
        ("a", None, "", "request_id must be a string"),
        ("a", None, 3, "request_id must be a string"),
    ],
)
async def test_wrong_requests_raise_at_the_first_output(async_llm, prompt, params, name, message):
    generator = async_llm.generate(prompt, params, name)
    with pytest.raises(InvalidRequestError, match=message):
        await anext(generator)
    assert async_llm._in_flight == {}


async def test_a_failing_request_fails_alone_and_by_its_own_name(async_llm):
    other = asyncio.create_task(collect(async_llm, "ab", tokens(20)))
    with pytest.raises(RequestFailedError, match="request 'mine' failed: ValueError") as caught:
        await collect(async_llm, "c!", tokens(5), "mine")
    assert caught.value.request_id == "mine"
    assert texts(await other)[-1] == "ab" * 10


async def test_cancelling_a_task_aborts_its_request(async_llm, engine):
    """And no other; nothing is left behind."""
    engine.delay = 0.001
    other = asyncio.create_task(collect(async_llm, "z", tokens(200)))
    task = asyncio.create_task(collect(async_llm, "a", tokens(599)))
    await until(lambda: len(engine.said) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: len(engine.aborted) == 1)
    assert texts(await other)[-1] == "z" * 200
    assert async_llm._in_flight == {}
    assert len(engine.aborted) == 1


async def test_a_timeout_aborts(async_llm, engine):
    engine.delay = 0.001
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(collect(async_llm, "a", tokens(599)), 0.05)
    await until(lambda: len(engine.aborted) == 1)


@pytest.mark.parametrize("end", ["aclose", "drop"])
async def test_a_generator_left_early_aborts(async_llm, engine, end):
    engine.delay = 0.001
    generator = async_llm.generate("a", tokens(599))
    await anext(generator)
    if end == "aclose":
        await generator.aclose()
    else:
        del generator
        gc.collect()
    await until(lambda: len(engine.aborted) == 1 and not async_llm._in_flight)


async def test_a_generator_that_was_never_read_has_started_nothing(async_llm, engine):
    generator = async_llm.generate("a", tokens(5))
    await asyncio.sleep(0.01)
    await generator.aclose()
    assert engine.said == {}


async def test_abort_by_name_ends_the_generator_with_a_last_output(async_llm, engine):
    """The text so far is in it; unknown names are passed over."""
    engine.delay = 0.001
    task = asyncio.create_task(collect(async_llm, "a", tokens(599), "mine"))
    await until(lambda: engine.steps > 3)
    await async_llm.abort(["unknown", "mine"])
    last = (await task)[-1]
    assert last.finished
    assert last.request_id == "mine"
    assert last.outputs[0].finish_reason == "abort"
    assert last.outputs[0].text
    await async_llm.abort("mine")


async def test_names_in_flight_are_unique_and_never_meet_numbers(async_llm, llm, engine):
    """A caller's "0" is not the LLM's own request 0; a name is free again when it has ended."""
    engine.delay = 0.001
    with engine.held():
        number = llm.stream("z", tokens(20))
        task = asyncio.create_task(collect(async_llm, "a", tokens(20), number.request_id))
        await until(lambda: number.request_id in async_llm._in_flight)
        with pytest.raises(InvalidRequestError, match="is in flight: ids must be unique"):
            await collect(async_llm, "b", tokens(1), number.request_id)
    outputs = await task
    assert {output.request_id for output in outputs} == {number.request_id}
    assert texts(outputs)[-1] == "a" * 20
    assert "".join(texts(number)) == "z" * 20
    await collect(async_llm, "b", tokens(1), number.request_id)


async def test_a_request_without_a_name_takes_none_that_a_caller_may_choose(async_llm, engine):
    """Whatever numbers others chose as names, a request that gives none is served."""
    with engine.held():
        named = [
            asyncio.create_task(collect(async_llm, "a", tokens(1), str(number)))
            for number in range(9)
        ]
        await until(lambda: len(async_llm._in_flight) == 9)
        unnamed = asyncio.create_task(collect(async_llm, "b", tokens(1)))
        await until(lambda: len(async_llm._in_flight) == 10)
    await asyncio.gather(*named, unnamed)
    with pytest.raises(InvalidRequestError, match="request_id must be"):
        await async_llm.abort(5)


def test_event_loops_come_and_go(async_llm):
    """Repeated asyncio.run over one engine, as in scripts and tests."""
    for _ in range(5):
        assert texts(asyncio.run(collect(async_llm, "ab", tokens(2)))) == ["a", "ab"]
    gc.collect()
    assert len(async_llm._mailboxes) == 0


def test_several_event_loops_at_once_join_one_batch(async_llm, llm, engine):
    def work(letter):
        return asyncio.run(collect(async_llm, letter, tokens(30, output_kind=FINAL)))

    with ThreadPoolExecutor(6) as pool:
        with engine.held():
            futures = [pool.submit(work, letter) for letter in "abcdef"]
            deadline = time.monotonic() + 20
            while len(llm.engine_loop._inbox) + len(engine.requests) < 6:
                assert time.monotonic() < deadline
                time.sleep(0.002)
        assert [texts(f.result())[-1] for f in futures] == [c * 30 for c in "abcdef"]
    assert max(engine.batch_sizes) >= 5


def test_a_closed_event_loop_harms_nobody(async_llm, llm, engine, caplog):
    """Its requests are aborted; the engine's thread and other callers go on."""
    engine.delay = 0.001
    event_loop = asyncio.new_event_loop()
    generator = async_llm.generate("a", tokens(599))
    event_loop.run_until_complete(anext(generator))
    event_loop.close()  # without cancelling what is in flight
    deadline = time.monotonic() + 20
    while not engine.aborted:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]
    assert texts(asyncio.run(collect(async_llm, "ab", tokens(2)))) == ["a", "ab"]
    assert caplog.records == []
    with pytest.raises(StopIteration):  # finish it by hand, since its loop cannot
        generator.aclose().send(None)


def test_inside_a_running_loop_as_in_a_notebook(llm):
    """Blocking calls and awaited ones from one cell, with the loop running."""
    async_llm = AsyncLLM.from_llm(llm)

    async def cell():
        first = texts(llm.generate("ab", tokens(2), use_tqdm=False))
        second = texts(await collect(async_llm, "ab", tokens(2)))
        return first + second + texts(llm.stream("ab", tokens(2)))

    assert asyncio.run(cell()) == ["ab", "a", "ab", "a", "b"]


async def test_one_wake_up_carries_a_whole_step(async_llm, engine, monkeypatch):
    """Outputs that come while the event loop is busy cost one system call together."""
    wakes = []
    event_loop = asyncio.get_running_loop()
    call = event_loop.call_soon_threadsafe
    monkeypatch.setattr(
        event_loop, "call_soon_threadsafe", lambda *args: (wakes.append(args), call(*args))
    )
    with engine.held():
        tasks = [asyncio.create_task(collect(async_llm, "a", tokens(50))) for _ in range(20)]
        await until(lambda: len(async_llm._in_flight) == 20)
    deadline = time.monotonic() + 20
    while len(engine.requests) or not engine.said:  # the event loop is busy meanwhile
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(wakes) == 1
    assert all(texts(result)[-1] == "a" * 50 for result in await asyncio.gather(*tasks))


async def test_the_rest_of_the_surface(async_llm):
    assert (await async_llm.get_tokenizer()).decode([97]) == "a"
    assert await async_llm.get_default_sampling_params() == SamplingParams()
    assert await async_llm.reset_prefix_cache() is True
    assert await async_llm.get_metrics() == {"num_steps": 0.0}
    assert async_llm.config.model.model == "echo"
    assert repr(async_llm) == "AsyncLLM(model='echo')"


async def test_closing_an_owned_engine_frees_it_and_ends_what_runs(make_llm):
    async_llm = AsyncLLM("echo")
    engine = async_llm._llm.llm_engine
    engine.delay = 0.001
    async with async_llm:
        task = asyncio.create_task(collect(async_llm, "a", tokens(599)))
        await until(lambda: engine.steps > 2)
    with pytest.raises(EngineClosedError):
        await task
    assert engine.closed
    assert async_llm.closed
    async_llm.shutdown()
    with pytest.raises(EngineClosedError, match="make a new one"):
        await collect(async_llm, "a", tokens(1))
    with pytest.raises(EngineClosedError):
        await async_llm.get_metrics()
    with pytest.raises(EngineClosedError), async_llm:
        pass


async def test_closing_a_borrowed_engine_ends_only_its_own_requests(llm, engine):
    """The LLM it was made from, and others made from it, go on."""
    engine.delay = 0.001
    other = AsyncLLM.from_llm(llm)
    with AsyncLLM.from_llm(llm) as async_llm:
        task = asyncio.create_task(collect(async_llm, "a", tokens(599)))
        await until(lambda: engine.steps > 2)
    assert (await task)[-1].outputs[0].finish_reason == "abort"
    assert not llm.closed
    assert texts(await collect(other, "ab", tokens(2))) == ["a", "ab"]
    llm.close()
    assert other.closed
    with pytest.raises(EngineClosedError):
        await collect(other, "ab", tokens(2))


def test_a_borrowed_engine_stays_alive_and_the_last_user_frees_it(engine_threads, make_llm):
    """Reference counts do it, without the garbage collector."""
    owner = AsyncLLM("echo")
    llm = owner._llm
    del owner
    async_llm = AsyncLLM.from_llm(llm)
    engine = weakref.ref(llm.llm_engine)
    del llm
    assert texts(asyncio.run(collect(async_llm, "ab", tokens(2)))) == ["a", "ab"]
    gc.collect()  # the event loop itself is a cycle
    gc.disable()
    try:
        del async_llm
        deadline = time.monotonic() + 20
        while engine() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        gc.enable()
    assert not engine_threads()
