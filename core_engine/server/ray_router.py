"""PrefixRouter: sends a request to the replica that has its prefix cached, by Ray Serve's hook."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from quire.server.prefixes import Prefixes


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Routes by the beginnings of prompts, as long as that leaves no replica far behind.

    The longest beginning that any replica has had decides; one that none has had goes to a replica
    that its first bytes name, which all routers know alike. Where that one has many more requests
    than another, and for what has no prompt, those with the fewest are asked first.
    """

    def initialize_state(self, slack: int = 8) -> None:
        """Take the arguments of ``request_router_kwargs``.

        Parameters
        ----------
        slack
            Requests that a replica may have more than another for a prefix's sake.
        """
        self._slack = slack
        self._prefixes = Prefixes()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas by rank, those that are asked first in front."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        if not by_id:
            return []
        if pending_request is not None:
            # Between rounds in which all are full: otherwise they would follow without a pause.
            pending_request.routing_context.should_backoff = True
        keys = self._keys(pending_request)
        everyone = list(candidate_replicas)
        random.shuffle(everyone)  # of equal loads, the first is taken
        if not keys:
            return [everyone]
        chosen = self._prefixes.find(keys, by_id)
        if chosen is None:
            chosen = max(by_id, key=lambda each: _rank(keys[0], each))
        if self._load(chosen) - min(map(self._load, by_id)) > self._slack:
            return [everyone]
        others = [replica for replica in everyone if replica.replica_id != chosen]
        return [[by_id[chosen]], others] if others else [[by_id[chosen]]]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember who has a prompt now."""
        self._prefixes.note(self._keys(pending_request), replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that there are."""
        super().update_replicas(replicas)
        self._prefixes.forget(self.curr_replicas)

    def _keys(self, pending_request: PendingRequest | None) -> list[bytes]:
        if pending_request is None or not pending_request.args:
            return []
        asked = pending_request.args[0]
        beginning = asked.get("beginning", b"") if isinstance(asked, dict) else b""
        return self._prefixes.keys(beginning) if beginning else []

    def _load(self, replica_id: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica_id) or 0


def _rank(key: bytes, replica_id: ReplicaID) -> bytes:
    return blake2b(key + replica_id.unique_id.encode(), digest_size=8).digest()
