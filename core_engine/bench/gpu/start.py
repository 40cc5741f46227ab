"""From nothing to the demo model's first token, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from quire.bench.gpu.setting import Setting

GOAL = 3.0
_LEAST, _MOST = 3, 7

_PROGRAM = """
import json, sys, time
began = time.perf_counter()
import torch
imported = time.perf_counter()
from quire import LLM, SamplingParams
llm = LLM("quire/demo", device=sys.argv[1])
loaded = time.perf_counter()
llm.generate("The capital", SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
first = time.perf_counter()
print(json.dumps([imported - began, loaded - imported, first - loaded]), flush=True)
llm.close()
"""


def measure(setting: Setting) -> None:
    """Measure from the start of the process; the first run has compiled kernels to make."""
    totals = list[float]()
    phases = list[list[float]]()
    first_ever = 0.0
    while len(totals) < _LEAST or (len(totals) < _MOST and setting.left > 0):
        total, parts = _once(str(setting.device), max(setting.left, 30.0))
        if not first_ever:
            first_ever = total
            continue
        totals.append(total)
        phases.append(parts)
        if setting.left < total:  # another would not fit
            break
    import_, load, first = (sorted(each)[len(each) // 2] for each in zip(*phases, strict=True))
    setting.report(
        "first token of the demo model, from the start of the process",
        totals,
        "s",
        digits=2,
        goal=GOAL,
        limit=True,
        note=f"torch {import_:.2f} s, load {load:.2f} s, first token {first:.2f} s; the run "
        f"before these took {first_ever:.2f} s",
    )


def _once(device: str, timeout: float) -> tuple[float, list[float]]:
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        total = time.perf_counter() - started
        try:
            _, message = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if not line:
        raise RuntimeError(f"the process failed: {message.strip()[-500:]}")
    return total, json.loads(line)
