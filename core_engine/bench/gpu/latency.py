"""One sequence: how close a step comes to reading the weights and the cache once."""

from __future__ import annotations

import statistics

from quire.bench.gpu.engine_side import EngineSide
from quire.bench.gpu.setting import Setting
from quire.bench.gpu.shapes import LLAMA_8B, TINY

GOAL = 0.75
_LEAST, _MOST = 3, 7


def measure(setting: Setting) -> None:
    """Measure how long a token takes after the first, alone in its batch."""
    prompt_len, output_len = (16, 16) if setting.tiny else (512, 256)
    config = TINY if setting.tiny else LLAMA_8B
    longest = prompt_len + output_len + 16
    with EngineSide(
        config, setting.device, max_model_len=longest, max_num_seqs=4, enable_prefix_caching=False
    ) as side:
        [prompt] = side.prompts(1, prompt_len)
        side.generate([prompt], [16])  # compiles, captures
        steps, firsts = list[float](), list[float]()
        while len(steps) < _LEAST or (len(steps) < _MOST and setting.left > 0):
            done = side.generate([prompt], [output_len])
            steps.append((done.total - done.first) / (output_len - 1))
            firsts.append(done.first)
            if setting.left < 0 and steps:
                break
        read = side.weight_bytes + side.kv_bytes_per_token * (prompt_len + output_len / 2)
    name = f"first token, {prompt_len} in"
    setting.report(name, [1e3 * each for each in firsts], "ms")
    note = f"{read / 1e9:.2f} GB read in a step"
    more = {}
    if setting.copied:
        share = read / setting.copied / statistics.median(steps)
        more = {"ratio": share, "ratio_to": "of copy", "goal": GOAL}
    name = f"decode of one sequence, {prompt_len} in, {output_len} out"
    milliseconds = [1e3 * each for each in steps]
    setting.report(name, milliseconds, "ms a token", digits=3, note=note, **more)
