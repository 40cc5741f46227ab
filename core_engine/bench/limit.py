"""The hardware's limit: how fast memory is read and matrices are multiplied, and what follows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quire.bench.workload import Workload

_READ_BYTES = 1 << 29
_MATRIX = (512, 896, 4864)  # rows, inputs, outputs
_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a step works through.

    Attributes
    ----------
    layer_weights, head_weights : int
        Numbers of the layers, and of the output matrix.
    step_bytes : int
        Of all weights that a step reads.
    """

    layer_weights: int
    head_weights: int
    step_bytes: int

    @classmethod
    def of(cls, folder: str | Path, vocab_size: int) -> ModelSize:
        """Read it off the headers of a folder's safetensors files."""
        from safetensors import safe_open

        layers = tables = table = num_bytes = 0
        for path in sorted(Path(folder).glob("*.safetensors")):
            num_bytes += path.stat().st_size
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    shape = file.get_slice(name).get_shape()
                    if len(shape) == 2 and shape[0] == vocab_size:
                        tables, table = tables + 1, math.prod(shape)
                    else:
                        layers += math.prod(shape)
        total = layers + tables * table
        read = layers + table  # of an embedding that is no output matrix, a few rows
        return cls(layers, table, num_bytes * read // max(total, 1))


@dataclass(frozen=True, slots=True)
class Limit:
    """What a machine can do at most.

    Attributes
    ----------
    bytes_per_second : float
        Of memory, read in order by all threads.
    flops : float
        Floating-point operations per second of the fastest product there is, of 512 rows.
    """

    bytes_per_second: float
    flops: float

    def seconds(self, workload: Workload, size: ModelSize, max_num_seqs: int = 256) -> float:
        """Return the least time for a workload.

        To `first_token_seconds` every further step adds the time to read all weights once, or to
        compute a token for each sequence that still runs, whichever takes longer. Attention,
        KV cache and everything else are left out.

        Parameters
        ----------
        workload : Workload
        size : ModelSize
        max_num_seqs : int
            Sequences that run at once at most.
        """
        token = 2 * (size.layer_weights + size.head_weights) / self.flops
        reading = size.step_bytes / self.bytes_per_second
        total = self.first_token_seconds(workload, size)
        # Sequences in waves, the longest outputs together, as a perfect scheduler would.
        lens = sorted((n - 1 for n in workload.output_lens), reverse=True)
        for first in range(0, len(lens), max_num_seqs):
            wave = lens[first : first + max_num_seqs]
            for step in range(wave[0]):
                running = sum(1 for n in wave if n > step)
                total += max(reading, running * token)
        return total

    def first_token_seconds(self, workload: Workload, size: ModelSize) -> float:
        """Return the least time until every prompt is computed.

        A prompt token costs two operations per weight of the layers, a token that prompts share
        costs them once, and all weights are read once at least.
        """
        tokens = workload.num_computed_tokens
        computing = tokens * 2 * size.layer_weights / self.flops
        return max(computing, size.step_bytes / self.bytes_per_second)


def measure_limit(num_threads: int | None = None) -> Limit:
    """Measure this machine for about two seconds.

    Parameters
    ----------
    num_threads : int, optional
        None: as many as torch uses.
    """
    with _threads(num_threads):
        return Limit(_read_rate(), _product_flops())


def measure_bandwidth(num_threads: int | None = None) -> float:
    """Return `Limit.bytes_per_second` of this moment, in about a second; see `measure_limit`."""
    with _threads(num_threads):
        return _read_rate()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_rate() -> float:
    import torch

    return _READ_BYTES / _best(torch.ones(_READ_BYTES // 8, dtype=torch.int64).max)


def _best(function: Callable[[], object]) -> float:
    """Return the least of several times that a call takes, in seconds."""
    function()
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < 3:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _product_flops() -> float:
    import torch

    from quire.kernels.cpu.backend import why_missing
    from quire.kernels.cpu.packed_linear import PackedLinear

    rows, inputs, outputs = _MATRIX
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.rand(rows, inputs), torch.rand(outputs, inputs).to(dtype)
        narrow = x.to(dtype)
        seconds.append(_best(partial(torch.nn.functional.linear, narrow, weight)))
        if why_missing() is None:
            seconds.append(_best(partial(PackedLinear(weight), x)))
    return 2.0 * rows * inputs * outputs / min(seconds)
