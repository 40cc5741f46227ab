"""Compare kernels with the reference, case by case: a JSON line for each that is begun and done.

Started by check.py, in a process of its own: a kernel that reads where it must not takes its
process along, and the next process goes on with the next case.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch


def backend_for(device: str, *, interpret: bool) -> Any:
    """Return the kernels under test."""
    if interpret:
        from quire.kernels.triton.backend import TritonBackend

        return TritonBackend()
    from quire.kernels import get_backend

    return get_backend(device)


def has_kernel(backend: Any, name: str) -> bool:
    """Whether an operation is the backend's own, and not the reference's."""
    from quire.kernels.reference.backend import ReferenceBackend

    found = getattr(type(backend), name, None)
    return found is not None and found is not getattr(ReferenceBackend, name, None)


def main() -> None:
    """Run the cases that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--most", type=int, required=True, help="of each case, for each type")
    parser.add_argument("--seconds", type=float, required=True, help="for all of them")
    parser.add_argument("--seed", type=int, required=True)
    asked = parser.parse_args()

    from kernel_cases import CASES, WEIGHTS, operation
    from kernel_draw import Draw

    device = torch.device(asked.device)
    backend = backend_for(asked.device, interpret=asked.interpret)
    # The interpreter computes in numpy, which has no bfloat16.
    dtypes = [torch.float32, torch.float16] + ([] if asked.interpret else [torch.bfloat16])
    deadline = time.monotonic() + asked.seconds
    for number, name in enumerate(asked.cases):
        started = time.monotonic()
        weights = [WEIGHTS.get(each, 1.0) for each in asked.cases[number:]]
        # What a case leaves over is for those behind it.
        seconds = max(0.0, deadline - started) * weights[0] / sum(weights)
        print(json.dumps({"begin": name, "seconds": seconds}), flush=True)
        done, problem = 0, None
        if not hasattr(backend, operation(name)):
            print(json.dumps({"end": name, "absent": True}), flush=True)
            continue
        try:
            with torch.inference_mode():
                for index in range(asked.most * len(dtypes)):
                    if index >= len(dtypes) and time.monotonic() - started > seconds:
                        break
                    dtype = dtypes[index % len(dtypes)]
                    seed = asked.seed + index
                    is_big = not asked.interpret and index >= 3 and index % 2 == 1
                    draw = Draw(seed, device, dtype, big=is_big)
                    CASES[name](draw, backend)
                    done += 1
        except Exception as error:
            what = str(dtype).removeprefix("torch.")
            problem = f"{type(error).__name__}: {error} (seed {seed}, {what})".splitlines()[0]
        told = {
            "end": name,
            "cases": done,
            "asked": asked.most * len(dtypes),
            "problem": problem,
            "own": has_kernel(backend, operation(name)),
            "seconds": time.monotonic() - started,
            "backend": backend.name,
        }
        print(json.dumps(told), flush=True)
        if problem is not None and device.type != "cpu":
            # Its error may stay with the device's context: the rest is for another process.
            return


if __name__ == "__main__":
    main()
