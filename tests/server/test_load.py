"""A served model under load: nothing is lost, nothing leaks, and every answer is the right one."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from pathlib import Path

import pytest
from servers import ServerProcess

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

NUM_CLIENTS = 64
SECONDS = 120.0
SETTLED_AFTER = 30.0
MOST_GROWTH = 32e6
"""Bytes by which a process's memory may differ between two looks at it."""

PROMPTS = [
    "The capital of France is",
    "Question: What is the capital of Japan? Answer:",
    "The currency of Mexico is",
    "Three plus four is",
]


def memory(pid: int) -> int:
    """Return what a process has in memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def request_body(prompt: str, num_tokens: int, *, chat: bool) -> tuple[str, dict]:
    body = {
        "model": "quire/demo",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    if chat:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", {**body, "prompt": prompt}


async def stream(client, path: str, body: dict, most_chunks: int | None = None) -> str | None:
    """Read an answer; leave in the middle of it after so many chunks, and return None."""
    text, finished, num_chunks = "", False, 0
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                assert finished
                return text
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                finished = finished or choice["finish_reason"] == "length"
            num_chunks += 1
            if num_chunks == most_chunks:
                return None
    raise AssertionError("the stream broke off")


async def gauge(client, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(rf"^quire:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


async def run(server: ServerProcess, seconds: float, num_clients: int) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
    counts = {"whole": 0, "left": 0}
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        expected = {}
        for prompt in PROMPTS:
            for chat in (False, True):
                path, body = request_body(prompt, 60, chat=chat)
                expected[prompt, chat] = await stream(client, path, body)
        end = time.monotonic() + seconds

        async def one_client(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                prompt, chat = rng.choice(PROMPTS), rng.random() < 0.5
                path, body = request_body(prompt, rng.randint(1, 60), chat=chat)
                leave = rng.randint(1, 10) if rng.random() < 0.3 else None
                text = await stream(client, path, body, leave)
                if text is None:
                    counts["left"] += 1
                else:
                    counts["whole"] += 1
                    assert expected[prompt, chat].startswith(text)

        before = 0

        async def watch() -> None:
            nonlocal before
            await asyncio.sleep(min(SETTLED_AFTER, seconds / 4))
            before = memory(server.process.pid)

        await asyncio.gather(watch(), *(one_client(i) for i in range(num_clients)))
        deadline = time.monotonic() + 20
        while await gauge(client, "num_requests_running") + await gauge(
            client, "num_requests_waiting"
        ):
            assert time.monotonic() < deadline, "requests run on for nobody"
            await asyncio.sleep(0.05)
        assert await gauge(client, "kv_cache_usage_perc") == 0
        after = memory(server.process.pid)
        path, body = request_body(PROMPTS[0], 60, chat=False)
        assert await stream(client, path, body) == expected[PROMPTS[0], False]
    assert counts["whole"] > num_clients
    assert counts["left"] > num_clients / 4
    print(f"\n{counts}, memory {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB")
    assert after - before < MOST_GROWTH
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("seconds", "num_clients"),
    [
        pytest.param(4.0, 16, id="briefly"),
        pytest.param(SECONDS, NUM_CLIENTS, id="at length", marks=pytest.mark.slow),
    ],
)
async def test_clients_that_stay_and_clients_that_leave(seconds, num_clients):
    """Every text is a beginning of the one that a lone client gets; then all is as it was."""
    server = ServerProcess("quire/demo", "--max-num-seqs", "32")
    try:
        await run(server, seconds, num_clients)
        assert server.stop() == 0
    finally:
        server.kill()
