"""All parts, one after the other, each with its time; and what they are measured on."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from quire.bench.gpu.ceilings import COPY, PRODUCT
from quire.bench.gpu.figure import Figure
from quire.bench.gpu.part import PARTS

SECONDS = {
    "ceilings": 15.0,
    "kernels": 80.0,
    "latency": 40.0,
    "throughput": 65.0,
    "start": 35.0,
    "mixed": 65.0,
}
"""What each part may take, its process and all."""
_OWN = 0.8
"""The share of that which a part plans with; the rest is for starting, and for what runs over."""


@dataclass(slots=True)
class Results:
    """What came out of a run.

    Attributes
    ----------
    device : str
        What the device is called.
    versions : dict of str to str
    figures : list of Figure
    problems : list of str
        Parts that failed or were cut.
    """

    device: str
    versions: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_device() -> str | None:
    """Return the accelerator that torch finds here, such as ``"cuda"``; None: there is none."""
    import torch

    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def describe(device: str) -> tuple[str, dict[str, str]]:
    """Return what a device is called, and the versions that figures depend on."""
    import torch

    import quire

    versions = {
        "quire": quire.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }
    if device == "cpu":
        return f"CPU ({platform.processor() or platform.machine()})", versions
    module: Any = torch.get_device_module(device)
    runtime = torch.version.cuda or torch.version.hip or ""
    versions["runtime"] = str(runtime)
    versions["driver"] = _driver()
    return str(module.get_device_name()), versions


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    """Ask the driver's own tool, of whichever maker it is."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "unknown"
    return "unknown"


def run_parts(
    names: Iterable[str],
    *,
    device: str,
    tiny: bool = False,
    scale: float = 1.0,
    tell: Callable[[str], None] = print,
) -> Results:
    """Measure parts in processes of their own.

    Parameters
    ----------
    names : iterable of str
        Some of `PARTS`; the ceilings come first in any case.
    device : str
    tiny : bool
        Sizes for a CPU.
    scale : float
        Of each part's time.
    tell : callable
        Takes a line for each figure and each problem, as they come.
    """
    results = Results(*describe(device))
    wanted = {"ceilings", *names}
    asked = {"device": device, "tiny": tiny, "copied": 0.0, "multiplied": 0.0}
    for name in PARTS:
        if name not in wanted:
            continue
        seconds = SECONDS[name] * scale
        started = time.monotonic()
        message = {**asked, "name": name, "seconds": _OWN * seconds}

        def take(figure: Figure) -> None:
            results.figures.append(figure)
            tell("  ".join(each for each in figure.cells() if each))
            if figure.part == "ceilings" and figure.values:
                rate = "copied" if figure.name == COPY else "multiplied"
                unit = 1e9 if figure.name == COPY else 1e12
                assert figure.name in (COPY, PRODUCT)
                asked[rate] = figure.median * unit

        problem = _run_part(message, seconds, take)
        if problem is not None:
            results.problems.append(f"{name}: {problem}")
            tell(f"{name}: {problem}")
        tell(f"{name} took {time.monotonic() - started:.0f} s")
    return results


def _run_part(
    message: dict[str, Any], seconds: float, take: Callable[[Figure], None]
) -> str | None:
    """Run a part; return what went wrong."""
    error: str | None = "its process ended without a word"
    cut = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-m", "quire.bench.gpu.part"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what it starts itself ends with it
        # A checkout's folder `kernels` is no package of that name, for which transformers looks.
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
    ) as process:

        def end() -> None:
            cut.set()
            _end_group(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.close()
            for line in process.stdout:
                told = json.loads(line)
                if "figure" in told:
                    take(Figure(**told["figure"]))
                else:
                    error = told["error"] and f"failed: {told['error']}"
        finally:
            timer.cancel()
            if process.poll() is None and (cut.is_set() or sys.exc_info()[0] is not None):
                _end_group(process)
    if cut.is_set():
        return f"cut after {seconds:.0f} s; what it had measured is kept"
    return error


def _end_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
