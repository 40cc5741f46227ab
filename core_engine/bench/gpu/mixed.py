"""Requests of mixed lengths: quire beside transformers' static and continuous batching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from quire.bench.gpu.engine_side import EngineSide
from quire.bench.gpu.setting import Setting
from quire.bench.gpu.shapes import LLAMA_1B, TINY
from quire.bench.gpu.transformers_sides import Reference, mixed_lens

GOAL = 5.0
_MOST = 5


def measure(setting: Setting) -> None:
    """Measure all sides in one process and in turns, on the same prompts."""
    config = TINY if setting.tiny else LLAMA_1B
    count, most_in, most_out, batch = (6, 32, 8, 3) if setting.tiny else (96, 512, 256, 32)
    options = {"kv_cache_memory_bytes": 64 << 20} if setting.tiny else {}
    with EngineSide(
        config,
        setting.device,
        max_model_len=most_in + most_out,
        max_num_seqs=count,
        max_num_batched_tokens=64 if setting.tiny else 8192,
        gpu_memory_utilization=0.4,  # the others need theirs
        enable_prefix_caching=False,
        **options,
    ) as side:
        reference = Reference(config, setting.device, setting.dtype)
        ins, outs = mixed_lens(count, most_in, most_out)
        prompts = [side.prompts(1, length)[0] for length in ins]
        tokens = sum(outs)
        lengths = f"{min(ins)}-{max(ins)} in, {min(outs)}-{max(outs)} out"

        def ours() -> float:
            return side.generate(prompts, outs).total

        def rates(name: str, times: list[float], **more: Any) -> None:
            found = [tokens / each for each in times]
            setting.report(f"{name}: {count} mixed", found, "tokens/s", digits=0, **more)

        ours()  # compiles, captures
        reference.static(prompts[:batch], [4] * batch, batch)
        times = _in_turns(
            {"quire": ours, "static": lambda: reference.static(prompts, outs, batch)},
            0.6 * setting.left,
        )
        ratio = statistics.median(times["static"]) / statistics.median(times["quire"])
        rates(f"transformers, static batches of {batch}", times["static"], note=lengths)
        rates("quire", times["quire"], ratio=ratio, ratio_to="x static", goal=GOAL)
        # Told apart, because it may fail, or its start may take what time there is.
        name = "transformers, continuous batching"
        try:
            times = _in_turns(
                {
                    "continuous": lambda: reference.continuous(prompts, outs, tiny=setting.tiny),
                    "quire": ours,
                },
                setting.left,
            )
        except Exception as error:
            rates(name, [], note=f"failed: {type(error).__name__}: {error}"[:200])
            return
        ratio = statistics.median(times["continuous"]) / statistics.median(times["quire"])
        rates(name, times["continuous"], note=f"quire in turns with it: {ratio:.2f}x")


def _in_turns(sides: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Run each once, whatever it takes, and in turns again while there is time for all."""
    started = time.monotonic()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for done in range(_MOST):
        spent = time.monotonic() - started
        if done and spent * (done + 1) / done > seconds:
            break
        for name, run in sides.items():
            times[name].append(run())
    return times
