"""`make gpu-check`: are the kernels right on this GPU, and how fast is everything?

    python3 tests/gpu/check.py              on a GPU; writes the table into kernels/README.md
    python3 tests/gpu/check.py --interpret  kernels in Triton's interpreter, on the CPU, few cases
    python3 tests/gpu/check.py --cpu        the benchmarks on the CPU, at sizes that say nothing

It needs no install and no network: torch, triton, transformers, safetensors, tokenizers, numpy and
tqdm are enough. Each step has its time, all of them together less than eight minutes. Exit status:
0, 1 where a kernel is wrong or a part failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mirror import ROOT, use_checkout

COMPARING = 150.0
"""Seconds for all comparisons."""
_SEED = 20_000
_MOST = 24
"""Cases of each operation and type."""
_STARTING = 40.0
"""Seconds that a process has until its first line."""


@dataclass
class Compared:
    """What came of comparing.

    Attributes
    ----------
    lines : list of str
        One for each operation.
    wrong : list of str
    """

    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, line: str, *, wrong: bool = False) -> None:
        """Take a line, and print it."""
        self.lines.append(line)
        if wrong:
            self.wrong.append(line)
        print(line, flush=True)


def compare(
    names: list[str], *, device: str, interpret: bool, most: int, seconds: float
) -> Compared:
    """Compare all operations with the reference, in as many processes as it takes.

    Kernels are compiled for every form of their arguments, which takes processors' time: several
    processes do that at once where there are processors.
    """
    from kernel_cases import WEIGHTS

    result = Compared()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    lanes = 1 if interpret else max(1, min(4, cores // 4))
    shares: list[list[str]] = [[] for _ in range(lanes)]
    for name in sorted(names, key=lambda each: -WEIGHTS.get(each, 1.0)):
        least = min(shares, key=lambda share: sum(WEIGHTS.get(each, 1.0) for each in share))
        least.append(name)
    deadline = time.monotonic() + seconds
    threads = max(1, cores // lanes)

    def work(left: list[str]) -> None:
        left.sort(key=names.index)
        while left:
            if time.monotonic() > deadline:
                for name in left:
                    result.add(f"{name}: cut, there was no time")
                return
            left = _compare_some(left, result, device, interpret, most, deadline, threads)

    workers = [threading.Thread(target=work, args=(share,)) for share in shares if share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return result


def _compare_some(
    names: list[str],
    result: Compared,
    device: str,
    interpret: bool,
    most: int,
    deadline: float,
    threads: int,
) -> list[str]:
    """Compare until the process ends, for whatever reason; return what is left to compare."""
    seconds = max(1.0, deadline - time.monotonic())
    command = [
        sys.executable, str(ROOT / "tests" / "gpu" / "compare.py"), *names, "--device", device,
        "--most", str(most), "--seconds", str(seconds), "--seed", str(_SEED),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if interpret:
        command.append("--interpret")
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    left, begun = list(names), names[0]
    limit = time.monotonic() + _STARTING
    problem = None
    while True:
        try:
            line = lines.get(timeout=max(0.1, limit - time.monotonic()))
        except queue.Empty:
            problem = "hangs"
            break
        if line is None:
            status = process.wait()
            if left and status != 0:  # else it stopped after a case that was wrong
                problem = f"its process ended with {status}"
            break
        if not line.startswith("{"):
            continue
        told = json.loads(line)
        if "begin" in told:
            begun = told["begin"]
            limit = time.monotonic() + told["seconds"] + _STARTING  # compiling is slow, and counts
            continue
        left.remove(told["end"])
        _note(result, told)
        limit = time.monotonic() + _STARTING
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if problem is not None and left:
        name = begun if begun in left else left[0]
        left.remove(name)
        result.add(f"{name}: WRONG: {problem}", wrong=True)
    return left


def _note(result: Compared, told: dict[str, object]) -> None:
    if told.get("absent"):
        result.add(f"{told['end']}: not offered")
        return
    how = f"{told['backend']} kernels" if told["own"] else "plain torch"
    if told["problem"] is not None:
        line = f"{told['end']} ({how}): WRONG after {told['cases']} cases: {told['problem']}"
        result.add(line, wrong=True)
        return
    line = f"{told['end']} ({how}): right in {told['cases']} cases"
    if told["cases"] != told["asked"]:
        line += f" of {told['asked']}, cut by its time"
    result.add(line)


def main() -> int:
    """Compare, measure, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="no GPU: Triton's interpreter")
    parser.add_argument("--cpu", action="store_true", help="no GPU: tiny benchmarks")
    parser.add_argument("--only", help="some cases, with commas between; no benchmarks")
    parser.add_argument("--parts", help="some parts of the benchmark; none: the comparisons alone")
    parser.add_argument("--cases", type=int, help="of each operation and type")
    parser.add_argument("--time", type=float, default=1.0, help="factor on all times")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "kernels" / "README.md", help="whose table is written"
    )
    asked = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONSAFEPATH="1")
    use_checkout()
    started = time.monotonic()

    from kernel_cases import CASES

    from quire.bench.gpu.part import PARTS
    from quire.bench.gpu.run import Results, describe, find_device, run_parts
    from quire.bench.gpu.table import figures_table, section, write_section

    found = None if asked.interpret or asked.cpu else find_device()
    if found is None and not (asked.interpret or asked.cpu):
        print("torch finds no GPU here: nothing was checked (--interpret and --cpu do without)")
        return 2
    device = found or "cpu"
    name, versions = describe(device)
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in versions.items())}", flush=True)

    compared = Compared()
    if found is not None or asked.interpret:
        names = list(CASES) if asked.only is None else asked.only.split(",")
        if unknown := [each for each in names if each not in CASES]:
            print(f"--only {', '.join(unknown)}: these are {', '.join(CASES)}")
            return 2
        compared = compare(
            names,
            device=device,
            interpret=asked.interpret,
            most=asked.cases or (2 if asked.interpret else _MOST),
            seconds=COMPARING * asked.time,
        )
        spent = time.monotonic() - started
        print(f"{len(compared.wrong)} of {len(names)} wrong, {spent:.0f} s", flush=True)

    results = Results(name, versions)
    parts = list(PARTS) if asked.parts is None else [p for p in asked.parts.split(",") if p]
    if parts and asked.only is None and not (asked.interpret and not asked.cpu):
        results = run_parts(
            parts,
            device=device,
            tiny=asked.cpu,
            scale=asked.time,
            tell=lambda line: print(line, flush=True),
        )
        print(f"\n{figures_table(results)}\n")
    for line in (*compared.wrong, *results.problems):
        print(line)
    if found is not None and asked.only is None:
        write_section(asked.readme, section(results, sorted(compared.lines)))
        print(f"written into {asked.readme}")
    print(f"{time.monotonic() - started:.0f} s in all")
    # What was cut by its time is said, and no fault.
    failed = [each for each in results.problems if ": cut after " not in each]
    return 1 if compared.wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
