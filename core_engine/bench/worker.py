"""A side in a process of its own: jobs come in as JSON lines, results go out as JSON lines.

``python -m quire.bench.worker`` is started by :class:`quire.bench.contest.Contestant`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, TextIO

from quire.bench.sides import SIDES, Side
from quire.bench.workload import Workload


def main() -> None:
    """Serve jobs until the input ends."""
    # Whatever a library prints must not mix with the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    try:
        side: Side = SIDES[first["side"]](first["model"], **first["options"])
    except Exception as error:
        _send(results, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(results, {"versions": side.versions()})
    for line in sys.stdin:
        try:
            measured = side.run(Workload(**json.loads(line)))
            # Linux counts in KiB.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            _send(results, {**measured, "peak_bytes": float(peak)})
        except Exception as error:
            _send(results, {"error": f"{type(error).__name__}: {error}"})


def _send(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
