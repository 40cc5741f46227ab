"""Many callers through every door of one engine for a while: each gets its own answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import pytest

from quire import LLM, AsyncLLM, RequestFailedError, SamplingParams

WORDS = ["hello", "the quick", "brown fox", "What is", "capital", "dog", "lazy", "France"]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [{}, {"async_scheduling": True, "swap_space": 0.01}], ids=str)
def test_doors_under_load_answer_as_one_caller_alone(tiny_llama, ways):
    """Threads, streams, tasks, aborts and failures at once, in a cache too small for all."""
    cases = [
        (word, SamplingParams(temperature=1.0, seed=i, max_tokens=3 + 5 * i, ignore_eos=True))
        for i, word in enumerate(WORDS)
    ]
    bad = SamplingParams(
        max_tokens=9, logits_processors=[lambda ids, row: row if len(ids) < 4 else 1 / 0]
    )
    options = {"dtype": "float32", "block_size": 4, "num_gpu_blocks_override": 80, **ways}
    with LLM(tiny_llama, **options) as llm:
        expected = [llm.generate(*case, use_tqdm=False)[0].outputs[0].text for case in cases]
        async_llm = AsyncLLM.from_llm(llm)
        wrong: list[object] = []

        def check(i, text):
            if text != expected[i]:
                wrong.append((cases[i][0], text, expected[i]))

        def batches(rng):
            for _ in range(12):
                chosen = [rng.randrange(len(cases)) for _ in range(6)]
                prompts, params = zip(*(cases[i] for i in chosen), strict=True)
                for i, output in zip(
                    chosen, llm.generate(list(prompts), list(params), use_tqdm=False), strict=True
                ):
                    check(i, output.outputs[0].text)

        def streams(rng):
            for _ in range(30):
                i = rng.randrange(len(cases))
                with llm.stream(*cases[i]) as stream:
                    if rng.random() < 0.3:
                        next(stream)
                    else:
                        check(i, "".join(output.outputs[0].text for output in stream))

        def failures(rng):
            for _ in range(10):
                with pytest.raises(RequestFailedError, match="division by zero"):
                    llm.generate("hello", bad, use_tqdm=False)

        def tasks(rng):
            async def one(i, patience):
                async def read():
                    return [output async for output in async_llm.generate(*cases[i])]

                with contextlib.suppress(asyncio.TimeoutError):
                    check(i, (await asyncio.wait_for(read(), patience))[-1].outputs[0].text)

            async def many():
                await asyncio.gather(
                    *(one(rng.randrange(len(cases)), rng.choice([0.01, 60])) for _ in range(12))
                )

            for _ in range(5):
                asyncio.run(many())

        workers = [batches, batches, streams, streams, failures, tasks, tasks]
        failed: list[BaseException] = []

        def run(work, seed):
            try:
                work(random.Random(seed))
            except BaseException as error:
                failed.append(error)

        threads = [
            threading.Thread(target=run, args=(work, seed)) for seed, work in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
        assert (failed, wrong) == ([], [])
        metrics = llm.get_metrics()
        assert metrics["num_unfinished_requests"] == 0
        assert async_llm._in_flight == {}
        llm.engine_loop.call(lambda engine: engine.check_integrity())
        assert llm.reset_prefix_cache()
        assert llm.get_metrics()["kv_cache_usage"] == 0
