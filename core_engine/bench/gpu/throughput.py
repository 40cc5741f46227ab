"""A full batch: how close a step comes to what the device can read and multiply."""

from __future__ import annotations

import statistics

from quire.bench.gpu.engine_side import EngineSide
from quire.bench.gpu.setting import Setting
from quire.bench.gpu.shapes import LLAMA_8B, TINY

GOAL = 0.70
_LEAST, _MOST = 1, 5


def measure(setting: Setting) -> None:
    """Measure how long a step takes in which every sequence generates a token."""
    count, context, output_len = (4, 64, 8) if setting.tiny else (256, 1024, 128)
    config = TINY if setting.tiny else LLAMA_8B
    prompt_len = context - output_len // 2
    with EngineSide(
        config,
        setting.device,
        max_model_len=context + output_len,
        max_num_seqs=count,
        max_num_batched_tokens=64 if setting.tiny else 8192,
        enable_prefix_caching=True,
    ) as side:
        prompts = side.prompts(count, prompt_len)
        filled = side.generate(prompts, [2] * count)  # from here on, prompts are in the cache
        setting.report(
            f"prompts of {count} x {prompt_len} tokens",
            [count * prompt_len / filled.first],
            "tokens/s",
            digits=0,
            note="the first run of the process, with what is compiled and captured in it",
        )
        steps = list[float]()
        side.generate(prompts, [4] * count)
        while len(steps) < _LEAST or (len(steps) < _MOST and setting.left > 0):
            done = side.generate(prompts, [output_len] * count)
            steps.append((done.total - done.first) / (output_len - 1))
        weights = side.weight_bytes
        read = weights + count * context * side.kv_bytes_per_token
        numbers = weights / side.model.weights.dtype.itemsize
        spec = side.model.spec.layers
        scores = sum(4 * each.attention.num_heads * each.attention.head_dim for each in spec)
        flops = count * (2 * numbers + scores * context)
    more = {}
    if setting.copied and setting.multiplied:
        least = max(read / setting.copied, flops / setting.multiplied)
        more = {
            "ratio": least / statistics.median(steps),
            "ratio_to": "of the roofline",
            "goal": GOAL,
            "note": f"{read / 1e9:.1f} GB and {flops / 1e12:.2f} TFLOP in a step, "
            f"at the least {1e3 * least:.2f} ms",
        }
    setting.report(
        f"decode of {count} sequences, {context} tokens each",
        [count / each for each in steps],
        "tokens/s",
        digits=0,
        **more,
    )
