"""RayCluster: the Ray that ranks run on, found or started, and its room for them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from quire.errors import ConfigError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_ANSWER_SECONDS = 5.0

_ROOM_SECONDS = 60.0
"""How long what others use of the cluster may take to become free."""


def check_ray(what: str) -> None:
    """See to it that Ray is installed.

    Parameters
    ----------
    what
        Needs it, for the error.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"{what} needs a package that is not installed ({error.name}): pip install 'quire[ray]'"
        ) from None
    del ray


class RayCluster:
    """A connection of this process to Ray; the last to close it ends what was begun here.

    The one that the program has made; else the cluster of ``RAY_ADDRESS``, or that was started on
    this machine; else one of this machine alone.

    Parameters
    ----------
    what
        Asks for it, for errors.
    """

    _lock: ClassVar = threading.Lock()
    _users: ClassVar[int] = 0
    _is_own: ClassVar[bool] = False

    def __init__(self, what: str = "distributed_executor_backend='ray'") -> None:
        check_ray(what)
        import ray

        self._is_open = False
        with self._lock:
            if not ray.is_initialized():
                _connect()
                RayCluster._is_own = True
            RayCluster._users += 1
            self._is_open = True

    def close(self) -> None:
        """Leave it; and end it, where it was started here."""
        import ray

        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            RayCluster._users -= 1
            if RayCluster._users == 0 and RayCluster._is_own:
                RayCluster._is_own = False
                ray.shutdown()

    def nodes(self) -> list[dict[str, Any]]:
        """Return what Ray knows of each machine that is there."""
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def share_of_cpus(self, num_threads: int, num_ranks: int) -> int:
        """Return how many CPUs a rank takes: of a machine's, those of as many as have to share it.

        Parameters
        ----------
        num_threads
            That this machine computes with.
        num_ranks
        """
        with_cpus: int = sum(node["Resources"].get("CPU", 0) >= 1 for node in self.nodes())
        ranks_of_each = -(-num_ranks // max(1, with_cpus))
        return max(1, num_threads // ranks_of_each)


def _connect() -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": "warning"}
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "local":
        if address != "auto":
            _check_answers(address)
        try:
            ray.init(address=address, **quiet)
            return
        except ConnectionError:
            if address != "auto":
                raise
    ray.init(address="local", include_dashboard=False, **quiet)


def _check_answers(address: str) -> None:
    """Refuse an address that nobody is at, for which Ray itself waits a long time."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is for programs outside of a cluster, and this process is "
            "to compute in it: run it on a machine of the cluster, with RAY_ADDRESS=auto"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({error}); "
            "`ray start --head` starts one, and without RAY_ADDRESS one of this machine alone "
            "is started"
        ) from None


class Bundles:
    """What Ray keeps for each rank of a model.

    A placement group that this process is in, as a replica of Ray Serve is, is what is used;
    otherwise one is made, with a place on this machine for rank 0.

    Parameters
    ----------
    cluster : RayCluster
    num_ranks : int
    each : dict
        What a rank takes, such as ``{"CPU": 4}``.

    Raises
    ------
    ConfigError
        There is not as much.
    """

    def __init__(self, cluster: RayCluster, num_ranks: int, each: dict[str, float]) -> None:
        from ray.util.placement_group import get_current_placement_group

        self._cluster = cluster
        self._each = each
        self._num_ranks = num_ranks
        self.group: PlacementGroup
        given = get_current_placement_group()
        self._is_own = given is None
        if given is None:
            self.group = self._make()
            return
        if given.bundle_count < num_ranks:
            raise ConfigError(
                f"this process is in a placement group of Ray's with {given.bundle_count} bundles, "
                f"and the model has {num_ranks} ranks, of which each takes one, the first the "
                "process's own"
            )
        self.group = given

    @property
    def has_own_place(self) -> bool:
        """Whether a place of the group is kept for this process, which Ray does not know to be."""
        return self._is_own

    def _make(self) -> PlacementGroup:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        here = ray.get_runtime_context().get_node_id()
        self._check_room(here)
        anywhere: list[dict[str, str]] = [{}] * (self._num_ranks - 1)
        group: PlacementGroup = placement_group(
            [self._each] * self._num_ranks,
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": here}, *anywhere],
        )
        if not group.wait(_ROOM_SECONDS):
            remove_placement_group(group)
            raise ConfigError(
                f"the Ray cluster has room for {self._words()}, and for {_ROOM_SECONDS:g} s others "
                f"use it: {_listed(ray.available_resources(), self._each)} are free"
            )
        return group

    def _check_room(self, here: str) -> None:
        """Refuse what could never be, for which Ray would wait without an end."""
        ranks_at = {}
        for node in self._cluster.nodes():
            found = node["Resources"]
            ranks_at[node["NodeID"]] = min(
                int(found.get(name, 0) // count) for name, count in self._each.items()
            )
        there = ", ".join(
            f"{node['NodeManagerAddress']}: {_listed(node['Resources'], self._each)}"
            for node in self._cluster.nodes()
        )
        hint = ""
        if "CPU" in self._each:
            hint = "; OMP_NUM_THREADS says how many CPUs a rank takes of a machine"
        if sum(ranks_at.values()) < self._num_ranks:
            raise ConfigError(
                f"the Ray cluster has no room for {self._words()}: it could take "
                f"{sum(ranks_at.values())} ({there}). Add machines, or lower tensor_parallel_size "
                f"or pipeline_parallel_size{hint}"
            )
        if ranks_at.get(here, 0) < 1:
            raise ConfigError(
                f"rank 0 is this process, and its machine has no {_words(self._each)} in Ray's "
                f"books ({there}){hint}"
            )

    def _words(self) -> str:
        return f"{self._num_ranks} ranks with {_words(self._each)} each"

    def node_of(self, index: int) -> str:
        """Return the id of the machine that a rank's place is on."""
        from ray.util import placement_group_table

        return str(placement_group_table(self.group)["bundles_to_node_id"][index])

    def options(self, index: int) -> dict[str, Any]:
        """Return the options of an actor that takes a rank's place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        of_bundle = self.group.bundle_specs[index]
        return {
            "num_cpus": of_bundle.get("CPU", 0),
            "num_gpus": of_bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=index
            ),
        }

    def close(self) -> None:
        """Give back what was kept."""
        if self._is_own:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):  # Ray may be gone
                remove_placement_group(self.group)


def _listed(found: dict[str, float], names: dict[str, float]) -> str:
    return _words({name: found.get(name, 0) for name in names})


def _words(counts: dict[str, float]) -> str:
    return " and ".join(_spelled(counts))


def _spelled(counts: dict[str, float]) -> Iterator[str]:
    for name, count in counts.items():
        yield f"{count:g} {name}{'' if count == 1 else 's'}"
