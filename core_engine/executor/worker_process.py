"""WorkerProcess: a worker as the engine's process sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quire.executor.child_process import ChildProcess


class WorkerProcess(ChildProcess):
    """A process that runs a rank, and a thread that hears what it says.

    Parameters
    ----------
    rank : int
    fds : sequence of int
        Descriptors that it inherits, under the same numbers.
    num_threads : int
        For libraries that count them when they are loaded.
    lose : callable
        Told once, from a thread, with the rank and why, when the worker is no more, or hangs.
    """

    def __init__(
        self, rank: int, fds: Sequence[int], num_threads: int, lose: Callable[[int, str], None]
    ) -> None:
        environ = {"OMP_NUM_THREADS": str(num_threads)}
        super().__init__("quire.executor.worker", "rank", rank, fds, environ, lose)
        self.rank = rank

    def send_packed(self, data: bytes) -> None:
        """See `Channel.send_packed`."""
        self.channel.send_packed(data)
