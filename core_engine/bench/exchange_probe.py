"""ExchangeProbe: how long two processes take to add up numbers through shared memory.

``python -m quire.bench.exchange_probe FD`` is the second of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from types import TracebackType

from quire.bench.contest import BenchError

_FEW = 16  # numbers: next to nothing
_SMALL_TIMES = 300
_LARGE_TIMES = 40
_PATIENCE = 60.0


class ExchangeProbe:
    """Two processes, one of them this one, that share memory.

    Parameters
    ----------
    numbers : int
        Of a large exchange.
    """

    def __init__(self, numbers: int) -> None:
        from quire.parallel.shared_memory import SharedMemory

        self._numbers = numbers
        self._memory = SharedMemory.create(2)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quire.bench.exchange_probe", str(self._memory.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self._memory.fd],
        )
        try:
            self._memory.join(0, patience=_PATIENCE)
            self._hear()
        except BaseException:
            self.close()
            raise

    def measure(self) -> tuple[float, float]:
        """Return the seconds of a sum of next to nothing, and the bytes per second of a large one.

        Medians of several. The bytes are those of one rank's part, which the other takes in.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._numbers) + "\n")
        self._process.stdin.flush()
        small, large = _add_up(self._memory, self._numbers)
        self._hear()
        return small, self._numbers * 4 / max(large - small, 1e-9)

    def _hear(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise BenchError(f"the second process ended with {self._process.wait()}")

    def close(self) -> None:
        """End the second process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._memory.close()

    def __enter__(self) -> ExchangeProbe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _add_up(memory: object, numbers: int) -> tuple[float, float]:
    import torch

    from quire.parallel.shared_memory import SharedMemory

    assert isinstance(memory, SharedMemory)
    group = memory.group()
    medians = []
    for count, times in ((_FEW, _SMALL_TIMES), (numbers, _LARGE_TIMES)):
        x = torch.ones(count)
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            group.reduce(x)
            seconds.append(time.perf_counter() - started)
            x.fill_(1.0)
        medians.append(statistics.median(seconds))
    return medians[0], medians[1]


def main() -> None:
    """Add up what the first process does, as often as it says so."""
    import torch

    from quire.parallel.shared_memory import SharedMemory

    torch.set_num_threads(1)
    with SharedMemory.attach(int(sys.argv[1])) as memory:
        memory.join(1, patience=_PATIENCE)
        print("here", flush=True)
        for line in sys.stdin:
            _add_up(memory, json.loads(line))
            print("done", flush=True)


if __name__ == "__main__":
    main()
