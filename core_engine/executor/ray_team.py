"""RayTeam: the ranks of one model on the machines of a Ray cluster, from their start to their end.

Rank 0 is the engine's own process, wherever that is. Each other is an actor of Ray's, which starts
it, tells it what the engine's process does, and knows of its end. What the ranks compute with, they
hand each other by torch.distributed.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from quire import __version__
from quire.errors import ConfigError, RankError
from quire.executor.ranks import Ranks
from quire.executor.ray_cluster import Bundles, RayCluster
from quire.executor.ray_rank import PATIENCE, RayRank
from quire.executor.ray_worker import RayWorker, end_actor, how_it_ended
from quire.executor.team import Crew
from quire.parallel.fabric import connect_by_torch

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from quire.executor.shard import ShardSettings

_START_SECONDS = 120.0
"""How long the process of a rank may take to start."""

_REASON_SECONDS = 9.0
"""How long the reason may take to be known why nothing comes from a rank."""


class RayTeam(Crew):
    """Actors for all ranks but the first, which is this process's.

    Parameters
    ----------
    settings : ShardSettings
        Whose number of threads is a whole machine's.
    device : torch.device
        Of rank 0, where Ray does not say which.
    model : mapping
        The arguments that `quire.models.hub.resolve` finds the model by, on any machine.

    Attributes
    ----------
    settings : ShardSettings
        With each rank's number of threads.
    device : torch.device
        Of rank 0.
    """

    def __init__(
        self, settings: ShardSettings, device: torch.device, model: Mapping[str, Any]
    ) -> None:
        self.place = settings.place(0)
        self._is_lost = threading.Event()
        self._actors: list[Any] = []
        self._holder: Any = None
        self._server: Store | None = None
        self._bundles: Bundles | None = None
        self.settings, self.device = settings, device
        self._cluster = RayCluster()
        try:
            self._make_room()
            found = self._start_actors()
            self._server, host, port = _serve_store()
            self.ranks = Ranks(
                self.place.size,
                lambda rank, lose: RayWorker(
                    rank, self._actors[rank - 1], found[rank - 1]["address"], lose
                ),
                self._abort,
                _REASON_SECONDS,
            )
            self.ranks.tell(
                {"settings": self.settings.to_message(), "model": model, "store": [host, port]}
            )
            self.ends = self._connect(host, port)
        except BaseException:
            self.close()
            raise

    def _make_room(self) -> None:
        num_ranks, device = self.place.size, self.device
        if device.type == "cpu":
            cpus = self._cluster.share_of_cpus(self.settings.num_threads, num_ranks)
            each = {"CPU": float(cpus)}
        else:
            each = {"GPU": 1.0}
        self._bundles = Bundles(self._cluster, num_ranks, each)
        if device.type == "cpu":
            of_each = (int(each.get("CPU", 1)) for each in self._bundles.group.bundle_specs)
            self.settings = dataclasses.replace(self.settings, num_threads=max(1, min(of_each)))
        elif self._bundles.has_own_place:
            self.device = self._device_of_place(self._bundles)
        else:
            self.device = torch.device(device.type, 0)  # of those that Ray lets us see

    def _device_of_place(self, bundles: Bundles) -> torch.device:
        """Return the device that Ray keeps for rank 0, as this process has it."""
        import ray

        self._holder = ray.remote(_Holder).options(**bundles.options(0)).remote()
        name = str(ray.get(self._holder.device.remote(), timeout=_START_SECONDS))
        return torch.device(self.device.type, _index_of(name))

    def _start_actors(self) -> list[dict[str, Any]]:
        """Start them, and return where they are."""
        import ray
        from ray.exceptions import RayError

        assert self._bundles is not None
        kind = ray.remote(RayRank)
        for rank in range(1, self.place.size):
            options = self._bundles.options(rank)
            actor = kind.options(max_concurrency=8, max_restarts=0, **options).remote(rank)
            self._actors.append(actor)
        found: list[dict[str, Any]] = []
        for rank, actor in enumerate(self._actors, 1):
            try:
                answer = ray.get(actor.where.remote(), timeout=_START_SECONDS)
            except RayError as error:
                raise RankError(
                    rank,
                    f"could not be started: {how_it_ended(error)}; each machine of the Ray "
                    "cluster needs the same install of quire",
                ) from error
            if answer["version"] != __version__:
                raise ConfigError(
                    f"rank {rank} would be run by quire {answer['version']} on "
                    f"{answer['address']}, and this is quire {__version__}: install the same"
                )
            found.append(answer)
        return found

    def _connect(self, host: str, port: int) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # Not the server's own: this one is waited with, and that one can be ended meanwhile.
        store = TCPStore(host, port, is_master=False)
        try:
            return connect_by_torch(
                store, self.place, self.device, PATIENCE, host, self._is_lost.is_set
            )
        except RuntimeError as error:
            raise self.ranks.loss(error) from error

    def _abort(self, rank: int, why: str) -> None:
        """End all waiting for a rank that is lost: here, and that of the others with them."""
        self._is_lost.set()
        self._server = None

    def close(self) -> None:
        """End the actors, and all else that was begun for them."""
        ranks = getattr(self, "ranks", None)  # which may not have come to be
        if ranks is not None:
            ranks.close()
        for actor in (*self._actors, self._holder):
            if actor is not None:
                end_actor(actor)
        self._server = None
        if self._bundles is not None:
            self._bundles.close()
        self._cluster.close()


class _Holder:
    """Holds rank 0's place, so that Ray gives its device to nobody else."""

    def device(self) -> str:
        """Return the name of the device that the place has."""
        import ray

        return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


def _index_of(name: str) -> int:
    """Return what a device of a machine is called in this process, which may not see all."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return int(name)
    names = [each.strip() for each in seen.split(",")]
    if name not in names:
        raise ConfigError(
            f"Ray keeps the device {name} for rank 0, and CUDA_VISIBLE_DEVICES={seen!r} hides it "
            "from this process, which is rank 0: leave that variable out"
        )
    return names.index(name)


def _serve_store() -> tuple[Store, str, int]:
    """Return a store that all ranks reach, and where."""
    import ray
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = ray.util.get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, host, store.port
