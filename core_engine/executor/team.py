"""Team: the ranks of one model on one machine, from their start to their end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from quire.engine.runner import ModelRunner
from quire.executor.connect import Connections
from quire.executor.parallel_runner import ParallelRunner, SpreadAdapters
from quire.executor.rank_runner import RankRunner
from quire.executor.ranks import Ranks
from quire.executor.worker_process import WorkerProcess

if TYPE_CHECKING:
    from quire.executor.shard import ShardSettings
    from quire.models.decoder import Decoder
    from quire.parallel.fabric import Ends
    from quire.parallel.place import Place


class Crew(ABC):
    """The ranks of one model, of which the first is this process's; see `Team` and `RayTeam`.

    Attributes
    ----------
    settings : ShardSettings
    place : Place
    ends : Ends
        Of rank 0.
    ranks : Ranks
        The others.
    """

    settings: ShardSettings
    place: Place
    ends: Ends
    ranks: Ranks

    def exchange_shards(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return what each rank says of its part of the model, once they are loaded."""
        return [own, *self.ranks.collect("ready")]

    def spread(self, model: Decoder) -> SpreadAdapters:
        """Return what prepares adapters on all ranks."""
        return SpreadAdapters(model, self.ranks)

    def make_runner(
        self, own: ModelRunner, adapters: SpreadAdapters, allocation: dict[str, Any]
    ) -> ParallelRunner:
        """Have all ranks allocate their KV caches, and return what an engine steps.

        Parameters
        ----------
        own
            Of this process.
        adapters
            From `spread`.
        allocation
            ``num_blocks``, ``block_size`` and ``kv_cache_dtype``, by name, of `own`.
        """
        self.ranks.tell({"what": "allocate", **allocation})
        self.ranks.collect("allocated")
        rank = RankRunner(own, self.place, self.ends)
        is_cpu = own.device.type == "cpu"
        return ParallelRunner(
            rank,
            self.ranks,
            adapters,
            allocation["block_size"],
            self.settings.num_threads if is_cpu else None,
            self.close,
        )

    @abstractmethod
    def close(self) -> None:
        """End the other ranks, and give back what they were connected by."""


class Team(Crew):
    """Worker processes for all ranks but the first, which is this process's.

    They begin to load their parts of the model at once, beside this process.

    Parameters
    ----------
    settings : ShardSettings
    device : torch.device
        Of rank 0.
    """

    def __init__(self, settings: ShardSettings, device: torch.device) -> None:
        self.place = settings.place(0)
        self.settings = settings
        self._connections = Connections(settings.tensor_size, settings.num_stages, device)
        try:
            self.ranks = Ranks(self.place.size, self._start, self._connections.abort)
            self.ranks.tell(
                {
                    "settings": settings.to_message(),
                    "connections": self._connections.to_message(),
                }
            )
            self.ends = self._connections.connect(self.place, device)
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, lose: Callable[[int, str], None]) -> WorkerProcess:
        return WorkerProcess(rank, self._connections.fds, self.settings.num_threads, lose)

    def close(self) -> None:
        """End the processes, and give back what they were connected by."""
        ranks = getattr(self, "ranks", None)  # which may not have come to be
        if ranks is not None:
            ranks.close()
        self._connections.close()
