"""OpenAI's client against a server that was started by vLLM's own command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["vllm.entrypoints.openai.api_server", "vllm"])
def test_a_client_of_openai_is_answered(module: str, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    words = ["--model", "quire/demo"] if module != "vllm" else ["serve", "quire/demo"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "quire.integrations.vllm",
                "-m",
                module,
                *words,
                *["--port", "0", "--disable-log-requests", "--api-server-count", "1"],
            ],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            deadline = time.monotonic() + 120
            while (found := re.search(r"http://[\d.]+:(\d+)", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            url = f"http://127.0.0.1:{found[1]}/v1"
            with openai.OpenAI(api_key="EMPTY", base_url=url) as client:
                model = client.models.list().data[0].id
                completion = client.completions.create(
                    model=model, prompt="The capital of France is", temperature=0, max_tokens=8
                )
                assert "Paris" in completion.choices[0].text
                chat = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": "What is the capital of France?"}],
                    temperature=0,
                )
                assert "Paris" in (chat.choices[0].message.content or "")
        finally:
            process.terminate()
            process.wait(60)
