"""One part in a process of its own: ``python -m quire.bench.gpu.part``, figures as JSON lines.

So a part that fails, or takes too long, ends alone, and leaves the device's memory to the next.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TextIO

from quire.bench.gpu.figure import Figure

PARTS = {
    "ceilings": "ceilings",
    "kernels": "kernel_speeds",
    "latency": "latency",
    "throughput": "throughput",
    "start": "start",
    "mixed": "mixed",
}
"""Names of the parts, in their order, and the modules that measure them."""


def run_part(
    name: str,
    *,
    device: str,
    tiny: bool,
    seconds: float,
    copied: float,
    multiplied: float,
    tell: Callable[[Figure], None],
) -> None:
    """Measure one part here; see `quire.bench.gpu.setting.Setting`."""
    import torch

    from quire.bench.gpu.setting import Setting

    setting = Setting(
        device=torch.device(device), part=name, tiny=tiny, seconds=seconds, tell=tell,
        copied=copied, multiplied=multiplied,
    )  # fmt: skip
    with torch.no_grad():
        import_module(f"quire.bench.gpu.{PARTS[name]}").measure(setting)


def main() -> None:
    """Read what to measure as one JSON line; write figures, and in the end an error or None."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the results
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    error = None
    try:
        run_part(**asked, tell=lambda figure: _send(results, {"figure": figure.to_message()}))
    except Exception as problem:
        import traceback

        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    _send(results, {"error": error})


def _send(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
