"""Copies of an engine behind every door, and each of several ranks."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from servers import ServerProcess

from quire import LLM, SamplingParams
from quire.integrations.langchain import VLLM

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.slow
def test_each_of_two_ranks(tiny_llama):
    prompts = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(4)]
    found = []
    for options in ({}, {"data_parallel_size": 2, "tensor_parallel_size": 2}):
        with LLM(tiny_llama, dtype="float32", num_gpu_blocks_override=64, **options) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.slow
def test_langchain_takes_the_argument():
    options = {"max_new_tokens": 8, "temperature": 0, "dtype": "float32"}
    llm = VLLM(model="quire/demo", vllm_kwargs={"data_parallel_size": 2}, **options)
    answers = llm.batch(["The capital of France is", "The capital of Japan is"])
    llm.close()
    assert "Paris" in answers[0]
    assert "Tokyo" in answers[1]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(each) for task in tasks for each in (task / "children").read_text().split()]


@pytest.mark.slow
def test_a_server_goes_on_without_one():
    """It serves by both; by one, when the other is killed; metrics tell; and it ends in order."""
    server = ServerProcess("quire/demo", "-dp", "2", "--dtype", "float32")
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:

            def ask(i: int) -> str:
                body = {
                    "model": "quire/demo",
                    "prompt": f"{i} is a number. The capital of France is",
                    "temperature": 0,
                    "max_tokens": 8,
                }
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            def gauge(name: str) -> float:
                lines = client.get("/metrics").text.splitlines()
                [line] = [each for each in lines if each.startswith(f"quire:{name}{{")]
                return float(line.split()[-1])

            with ThreadPoolExecutor(8) as pool:
                texts = list(pool.map(ask, range(8)))
            assert gauge("engine_replicas") == 2
            [replica] = children(server.process.pid)
            os.kill(replica, signal.SIGKILL)
            end = time.monotonic() + 30
            while gauge("engine_replicas") == 2 and time.monotonic() < end:
                time.sleep(0.05)
            assert gauge("engine_replicas") == 1
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(ask, range(8))) == texts
            assert client.get("/health").status_code == 200
        assert server.stop() == 0
        assert "replica 1 of the engine was lost" in server.log
    finally:
        server.kill()
