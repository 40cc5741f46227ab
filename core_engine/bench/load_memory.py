"""What loading a model takes, of time and of memory, in a fresh process.

``python -m quire.bench.load_memory MODEL OPTIONS`` prints it; `measure_load` runs that.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench.contest import BenchError
from quire.utils.freed_memory import return_freed_memory

if TYPE_CHECKING:
    from quire import LLM

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SMALL = {"max_num_seqs": 1, "max_model_len": 32, "skip_tokenizer_init": True}
"""Engine arguments with which there is next to no KV cache."""


def measure_load(model: str, options: dict[str, Any]) -> dict[str, float]:
    """Load a model in a process of its own.

    Parameters
    ----------
    model : str
    options : dict
        Engine arguments.

    Returns
    -------
    dict
        ``load_seconds``; ``weight_bytes``, what it has in memory afterwards; where the system tells
        (Linux), ``peak_bytes``: the most memory that the process held while it loaded, less what it
        held before. Pages of the checkpoint's files count as long as they are mapped.
    """
    command = [sys.executable, "-m", "quire.bench.load_memory", model, json.dumps(options)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = run.stderr.strip().splitlines()[-1:] or [f"it ended with {run.returncode}"]
        raise BenchError(f"loading {model} with {options}: {last[0]}")
    figures: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    """Load the model that the arguments name, and print what it took."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    # Modules, libraries and threads come with the first model, and belong to none.
    _open("quire/demo", options).close()
    gc.collect()
    return_freed_memory()
    _forget_peak()
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    llm = _open(model, options)
    figures = {"load_seconds": time.perf_counter() - started}
    if (peak := resident_bytes("VmHWM")) is not None and before is not None:
        figures["peak_bytes"] = float(peak - before)
    runner = llm.llm_engine._runner
    assert runner is not None
    figures["weight_bytes"] = float(runner.model.weight_bytes())
    print(json.dumps(figures))


def _open(model: str, options: dict[str, Any]) -> LLM:
    from quire import LLM

    return LLM(model, **{**_SMALL, **options})


def resident_bytes(field: str) -> int | None:
    """Return what the system counts of this process's memory; None where it does not tell.

    Parameters
    ----------
    field : {"VmRSS", "VmHWM"}
        Now, or at most until now.
    """
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _forget_peak() -> None:
    if _RESET.exists():
        _RESET.write_text(_RESET_PEAK, encoding="utf-8")


if __name__ == "__main__":
    main()
