"""ToldRank: a rank that is not the engine's own, which does what it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from quire.engine.runner import ModelRunner
from quire.executor.messages import MessageError
from quire.executor.rank_runner import RankRunner
from quire.executor.shard import ShardSettings, describe, load_shard
from quire.executor.wire import adapter_from_message, batch_from_message

if TYPE_CHECKING:
    from quire.models.adapter import PreparedAdapter
    from quire.parallel.fabric import Ends
    from quire.parallel.place import Place

_ORDERS = frozenset(
    {"allocate", "forward", "logits", "likeliest", "prepare", "set_adapter", "drop", "count"}
)
"""What a message can begin with, and is followed by the arguments of."""


class ToldRank:
    """A rank, from its settings to its last step; what brings it its messages is not its matter.

    Parameters
    ----------
    settings : ShardSettings
    place : Place
    device : torch.device
    ends : Ends
    reply : callable
        Takes a message to the engine's process.
    """

    def __init__(
        self,
        settings: ShardSettings,
        place: Place,
        device: torch.device,
        ends: Ends,
        reply: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._place, self._device, self._ends = place, device, ends
        self._settings = settings
        self._reply = reply
        self._runner: RankRunner | None = None
        self._adapters: dict[int, PreparedAdapter] = {}
        self._model = load_shard(settings, place, ends.group, device)
        reply({"what": "ready", **describe(self._model, device, settings)})

    def do(self, message: Mapping[str, Any]) -> bool:
        """Do what a message says, and return whether there is more to come."""
        what = message["what"]
        if what == "end":
            return False
        if what not in _ORDERS:
            raise MessageError(f"a worker does not know what {what!r} is")
        getattr(self, f"_{what}")(**{k: v for k, v in message.items() if k != "what"})
        return True

    # -- what can be ordered --------------------------------------------------------------------

    def _allocate(self, num_blocks: int, block_size: int, kv_cache_dtype: str) -> None:
        runner = ModelRunner(
            self._model,
            self._settings.kernels(self._device),
            num_blocks=num_blocks,
            block_size=block_size,
            kv_cache_dtype=getattr(torch, kv_cache_dtype),
            device=self._device,
        )
        self._runner = RankRunner(runner, self._place, self._ends)
        self._reply({"what": "allocated"})

    def _forward(self, batch: dict[str, Any]) -> None:
        assert self._runner is not None
        self._runner.forward(batch_from_message(batch, self._device))

    def _logits(self, indices: torch.Tensor, adapter_slots: torch.Tensor | None) -> None:
        assert self._runner is not None
        self._runner.logits(None, indices.to(self._device), adapter_slots)

    def _likeliest(self, indices: torch.Tensor, adapter_slots: torch.Tensor | None) -> None:
        assert self._runner is not None
        self._runner.likeliest(None, indices.to(self._device), adapter_slots)

    def _prepare(self, key: int, adapter: dict[str, Any]) -> None:
        self._adapters[key] = self._model.prepare_adapter(adapter_from_message(adapter))

    def _set_adapter(self, slot: int, key: int | None) -> None:
        self._model.set_adapter(slot, None if key is None else self._adapters[key])

    def _count(self) -> None:
        assert self._runner is not None
        counted = self._runner.exchanged()
        fields = None if counted is None else dataclasses.astuple(counted)
        self._reply({"what": "counted", "exchanged": fields})

    def _drop(self, keys: list[int]) -> None:
        for key in keys:
            del self._adapters[key]
