"""An LLM that sleeps has let its memory go, and wakes as it was."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

import quire
from quire import LLM, AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("level", [1, 2])
def test_it_answers_after_sleep_as_before(level: int, tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
        before = llm.generate("the quick brown fox", GREEDY, use_tqdm=False)[0]
        llm.wake_up()
        llm.sleep(level)
        llm.sleep(level)
        assert llm.is_sleeping
        assert not llm.closed
        with pytest.raises(quire.EngineClosedError, match=r"sleeps: call wake_up\(\)"):
            llm.generate("x", use_tqdm=False)
        llm.wake_up()
        llm.wake_up()
        assert not llm.is_sleeping
        after = llm.generate("the quick brown fox", GREEDY, use_tqdm=False)[0]
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert after.num_cached_tokens == 0
        llm.llm_engine.check_integrity()
    with pytest.raises(quire.EngineClosedError, match="closed"):
        llm.sleep()
    with pytest.raises(quire.EngineClosedError, match="closed"):
        llm.generate("x")


def test_sleep_becomes_deeper_and_refuses_other_levels(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
        for wrong in (0, 3, True, "1"):
            with pytest.raises(quire.InvalidRequestError, match="level"):
                llm.sleep(wrong)  # type: ignore[arg-type]
        llm.sleep(1)
        llm.sleep(2)
        assert llm.is_sleeping
        llm.sleep(1)
        llm.wake_up()
        assert llm.generate("the", GREEDY, use_tqdm=False)[0].finished


def test_requests_in_flight_are_aborted(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
        long = SamplingParams(max_tokens=None, ignore_eos=True)
        stream = llm.stream("the", long)
        next(stream)
        llm.sleep()
        last = list(stream)[-1]
        assert last.outputs[0].finish_reason in ("abort", "length")
        llm.wake_up()
        assert llm.generate("the", GREEDY, use_tqdm=False)[0].finished


def test_one_that_sleeps_can_be_closed(tiny_llama: Path) -> None:
    for level in (1, 2):
        llm = LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100)
        llm.sleep(level)
        llm.close()
        assert llm.closed
        with pytest.raises(quire.EngineClosedError, match="closed"):
            llm.wake_up()


def test_an_engine_that_is_awaited_wakes_for_its_callers(tiny_llama: Path) -> None:
    async def run() -> None:
        with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
            engine = AsyncLLM.from_llm(llm)
            llm.sleep(2)
            with pytest.raises(quire.EngineClosedError):
                async for _ in engine.generate("x", GREEDY):
                    pass
            llm.wake_up()
            outputs = [output async for output in engine.generate("x", GREEDY)]
            assert outputs[-1].finished

    asyncio.run(run())


def test_threads_that_sleep_and_wake_at_once_agree(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:

        def turn() -> None:
            for _ in range(3):
                llm.sleep(1)
                llm.wake_up()

        threads = [threading.Thread(target=turn) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert llm.generate("the", GREEDY, use_tqdm=False)[0].finished


def test_a_request_that_comes_while_others_are_aborted_does_not_hinder_sleep(
    tiny_llama: Path,
) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
        llm.generate("the", GREEDY, use_tqdm=False)
        loop = llm.engine_loop
        events: list[Any] = []
        abort_all = loop.abort_all

        def with_another(engine: Any) -> None:
            abort_all(engine)
            loop.submit([(llm._make_request("the quick", GREEDY), events.append)])

        loop.abort_all = with_another  # type: ignore[method-assign]
        llm.sleep(1)
        assert llm.is_sleeping
        llm.wake_up()
        assert llm.generate("the", GREEDY, use_tqdm=False)[0].finished
        [refused] = events
        assert isinstance(refused, quire.EngineClosedError)


def test_a_request_right_after_waking_waits_for_what_makes_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quire.llm

    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=100) as llm:
        llm.sleep(2)
        made = quire.llm.RequestMaker
        found: list[quire.RequestOutput] = []

        def slow(*args: object) -> object:
            other = threading.Thread(
                target=lambda: found.append(llm.generate("the", GREEDY, use_tqdm=False)[0])
            )
            other.start()
            other.join(0.2)
            threads.append(other)
            return made(*args)  # type: ignore[arg-type]

        threads: list[threading.Thread] = []
        monkeypatch.setattr(quire.llm, "RequestMaker", slow)
        llm.wake_up()
        threads[0].join(30)
        assert [output.finished for output in found] == [True]


def test_one_that_was_closed_asleep_is_closed(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=50)
    llm.sleep(2)
    llm.close()
    assert not llm.is_sleeping
    with pytest.raises(quire.EngineClosedError, match="closed"):
        llm.sleep(1)
    with pytest.raises(quire.EngineClosedError, match="closed"):
        llm.wake_up()


def test_waking_that_fails_loses_no_adapter(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", num_gpu_blocks_override=50) as llm:
        llm.sleep(2)
        adapter = quire.LoRARequest("a", 1, "/nowhere")
        llm._sleep._adapters = [adapter]
        for _ in range(2):
            with pytest.raises(quire.AdapterError):
                llm.wake_up()
            assert llm.is_sleeping
            assert llm._sleep._adapters == [adapter]
