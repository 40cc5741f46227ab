"""RayRank: a rank in a process that Ray has started, perhaps on another machine.

Ray brings what the engine's process says, and takes back what the rank answers. What ranks hand
each other within a step does not go by Ray.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

PATIENCE = 600.0
"""Seconds that a rank waits for the others, to begin and in a step."""


class RayRank:
    """An actor's methods; several of them may run at once.

    Parameters
    ----------
    rank : int
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._address = ""
        # Of its own, and not one of Ray's: a thread keeps its number of threads to compute with.
        threading.Thread(target=self._run, name=f"quire-rank-{rank}", daemon=True).start()

    def where(self) -> dict[str, Any]:
        """Say where this process is, and what is installed there."""
        import ray

        from quire import __version__

        context = ray.get_runtime_context()
        self._address = ray.util.get_node_ip_address()
        return {"version": __version__, "address": self._address, "node": context.get_node_id()}

    def tell(self, number: int, data: bytes) -> None:
        """Take a message, of a number by which they are brought into order."""
        with self._lock:
            self._early[number] = data
            while self._next in self._early:
                self._told.put(self._early.pop(self._next))
                self._next += 1

    def listen(self, seconds: float) -> list[bytes]:
        """Wait for what the rank has to say, at most for some seconds: none is a sign of life."""
        said = []
        try:
            said.append(self._replies.get(timeout=seconds))
            while True:
                said.append(self._replies.get_nowait())
        except queue.Empty:
            return said

    def _run(self) -> None:
        from quire.executor.messages import pack, unpack
        from quire.utils import log

        def reply(message: Any) -> None:
            self._replies.put(pack(message))

        try:
            log.configure(f"rank {self._rank}")
            told = self._start(unpack(self._told.get()), reply)
            while told.do(unpack(self._told.get())):
                pass
        except BaseException as error:
            reply({"what": "failed", "kind": type(error).__name__, "text": str(error)})
            raise

    def _start(self, message: dict[str, Any], reply: Any) -> Any:
        import torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from quire.executor.shard import ShardSettings
        from quire.executor.told_rank import ToldRank
        from quire.models.hub import resolve
        from quire.parallel.fabric import connect_by_torch

        # A model by its name may have another folder here, or be still to be fetched.
        path = str(resolve(**message["model"]))
        settings = ShardSettings(**{**message["settings"], "path": path})
        place = settings.place(self._rank)
        if settings.device_type == "cpu":
            device = torch.device("cpu")
            torch.set_num_threads(settings.num_threads)
        else:
            device = torch.device(settings.device_type, 0)  # of those that Ray lets it see
        host, port = message["store"]
        store = TCPStore(host, port, is_master=False)
        ends = connect_by_torch(store, place, device, PATIENCE, self._address)
        return ToldRank(settings, place, device, ends, reply)
