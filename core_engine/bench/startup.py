"""How long it takes from nothing to the first token, phase by phase, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

from quire.bench.contest import BenchError

_IMPORT = """
import json, time
started = time.perf_counter()
import quire
print(json.dumps({"import_quire": time.perf_counter() - started}))
"""

_FIRST_TOKEN = """
import json, sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
from quire import LLM, SamplingParams
llm = LLM(sys.argv[1])
ready = time.perf_counter()
llm.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=1), use_tqdm=False)
first = time.perf_counter()
import resource
print(json.dumps({
    "import_torch": imported - started,
    "load": ready - imported,
    "first_token": first - ready,
    "after_torch": first - imported,
    "total": first - started,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
}))
"""


def _measure(code: str, *args: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise BenchError(f"startup failed: {run.stderr.strip()[-2000:]}")
    figures: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return figures


def measure_startup(model: str) -> dict[str, float]:
    """Start twice in fresh processes and return the phases, in seconds.

    Returns
    -------
    dict
        ``import_quire`` alone; then ``import_torch``, ``load`` (``LLM(model)``), ``first_token``,
        ``after_torch`` (the last two) and ``total``.
    """
    return {**_measure(_IMPORT), **_measure(_FIRST_TOKEN, model)}
