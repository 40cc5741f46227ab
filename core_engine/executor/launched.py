"""Launched: this process's rank, where a launcher such as torchrun has started all of them.

Every rank runs the same program, and an engine in it that decides the same: nobody is told
anything, and what the ranks exchange is tensors alone.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from quire.errors import ConfigError
from quire.executor.connect import ends_by_memory
from quire.executor.rank_runner import RankRunner
from quire.kernels.cpu.backend import why_missing
from quire.parallel.fabric import connect_by_torch
from quire.parallel.shared_memory import SharedMemory

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from quire.engine.runner import ModelRunner, Runner
    from quire.executor.shard import ShardSettings

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS = 600.0
"""How long a rank waits for the others, to begin and in a step."""

_numbers = itertools.count()  # of engines, by which their entries of the store are told apart


def launched_rank(num_ranks: int) -> int:
    """Return which rank this process is.

    Raises
    ------
    ConfigError
        No launcher has started it, or not as many as that.
    """
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            "distributed_executor_backend='external_launcher' is for processes that a launcher "
            f"has started, as `torchrun --nproc-per-node {num_ranks} script.py` does; "
            f"{', '.join(missing)} is not in the environment"
        )
    world = int(os.environ["WORLD_SIZE"])
    if world != num_ranks:
        raise ConfigError(
            f"the launcher has started {world} processes, and tensor_parallel_size times "
            f"pipeline_parallel_size are {num_ranks}: make them equal"
        )
    return int(os.environ["RANK"])


class Launched:
    """The connections of one of the launcher's processes to the others.

    Parameters
    ----------
    settings : ShardSettings
    rank : int
    device : torch.device
        Of this rank.
    """

    def __init__(self, settings: ShardSettings, rank: int, device: torch.device) -> None:
        self.place = settings.place(rank)
        self._memory: SharedMemory | None = None
        self._store = _store()
        if device.type == "cpu":
            self._memory = self._share_memory()
        if self._memory is not None:
            self.ends = ends_by_memory(self._memory, self.place)
        else:
            self.ends = connect_by_torch(self._store, self.place, device, _SECONDS)

    def _share_memory(self) -> SharedMemory | None:
        """Map what rank 0 makes, where all ranks can."""
        rank, size = self.place.rank, self.place.size
        memory = None
        if rank == 0:
            if why_missing() is None:
                memory = SharedMemory.create(self.place.tensor_size, self.place.num_stages)
            fd = -1 if memory is None else memory.fd
            offer = {"machine": _machine(), "path": f"/proc/{os.getpid()}/fd/{fd}", "fd": fd}
            self._put("memory", offer)
        else:
            offer = self._get("memory")
            if offer["fd"] >= 0 and offer["machine"] == _machine() and why_missing() is None:
                try:
                    memory = SharedMemory.attach(os.open(offer["path"], os.O_RDWR))
                except OSError:  # of another user, or in another container
                    memory = None
        self._put(f"has-memory-{rank}", memory is not None)
        # Of all, also where one has none: nobody is to answer before it is asked.
        answers = [self._get(f"has-memory-{each}") for each in range(size)]
        if not all(answers):
            if memory is not None:
                memory.close()
            return None
        assert memory is not None
        memory.join(rank, patience=_SECONDS)
        return memory

    def _put(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def _get(self, name: str) -> Any:
        return json.loads(self._store.get(name))

    def exchange_shards(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return what each rank says of its part of the model, once they are loaded."""
        self._put(f"shard-{self.place.rank}", own)
        return [self._get(f"shard-{rank}") for rank in range(self.place.size)]

    def of_rank_0(self, name: str, own: Any) -> Any:
        """Return what rank 0 says, so that all go by the same."""
        if self.place.rank == 0:
            self._put(name, own)
        return self._get(name)

    def make_runner(self, own: ModelRunner) -> Runner:
        """Return what an engine steps."""
        runner = RankRunner(own, self.place, self.ends, everywhere=True, at_end=self.close)
        return cast("Runner", runner)  # nothing that it returns is None, where all get it

    def close(self) -> None:
        """Leave the others."""
        if self._memory is not None:
            self._memory.close()


def _store() -> Store:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # The launcher's own, and no group: that is the program's.
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_SECONDS)))
    return PrefixStore(f"quire-{next(_numbers)}", store)


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown to {os.getpid()}"
