"""The program of a worker process: a rank of a model that is not the engine's own.

It is started as ``python -m quire.executor.worker`` with the end of a channel, over which it is
told everything else; it ends when it is told to, or when nobody is at the other end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.executor.channel import Channel
from quire.executor.child import run_child
from quire.executor.messages import MessageError

if TYPE_CHECKING:
    import torch

    from quire.executor.rank_runner import RankRunner
    from quire.executor.shard import ShardSettings
    from quire.models.adapter import PreparedAdapter

_ORDERS = frozenset(
    {"allocate", "forward", "logits", "likeliest", "prepare", "set_adapter", "drop"}
)
"""What a message to a worker can begin with, and is followed by the arguments of."""


class Worker:
    """A rank, from its settings to its last step.

    Parameters
    ----------
    rank : int
    channel : Channel
        To the engine's process.
    """

    def __init__(self, rank: int, channel: Channel) -> None:
        self._rank = rank
        self._channel = channel
        self._runner: RankRunner | None = None
        self._adapters: dict[int, PreparedAdapter] = {}

    def run(self) -> None:
        """Do what is told, until that is to end."""
        from quire.executor.shard import ShardSettings

        message = self._channel.receive()
        settings = ShardSettings(**message["settings"])
        self._start(settings, message)
        while True:
            message = self._channel.receive()
            what = message["what"]
            if what == "end":
                return
            if what not in _ORDERS:
                raise MessageError(f"a worker does not know what {what!r} is")
            getattr(self, f"_{what}")(**{k: v for k, v in message.items() if k != "what"})

    def _start(self, settings: ShardSettings, message: dict[str, Any]) -> None:
        import torch

        from quire.executor.connect import connect
        from quire.executor.shard import describe, load_shard
        from quire.utils.cores import keep_to_own_cores

        device = settings.device(self._rank)
        place = settings.place(self._rank)
        if device.type == "cpu":
            keep_to_own_cores(0, settings.num_replicas)
            keep_to_own_cores(self._rank, place.size)
            torch.set_num_threads(settings.num_threads)
        self._device, self._place = device, place
        self._ends = connect(message["connections"], place, device)
        self._model = load_shard(settings, place, self._ends.group, device)
        self._channel.send({"what": "ready", **describe(self._model, device)})

    # -- what can be ordered --------------------------------------------------------------------

    def _allocate(self, num_blocks: int, block_size: int, kv_cache_dtype: str) -> None:
        import torch

        from quire.engine.runner import ModelRunner
        from quire.executor.rank_runner import RankRunner
        from quire.kernels import get_backend

        runner = ModelRunner(
            self._model,
            get_backend(self._device),
            num_blocks=num_blocks,
            block_size=block_size,
            kv_cache_dtype=getattr(torch, kv_cache_dtype),
            device=self._device,
        )
        self._runner = RankRunner(runner, self._place, self._ends)
        self._channel.send({"what": "allocated"})

    def _forward(self, batch: dict[str, Any]) -> None:
        from quire.executor.wire import batch_from_message

        assert self._runner is not None
        self._runner.forward(batch_from_message(batch, self._device))

    def _logits(self, indices: torch.Tensor, adapter_slots: torch.Tensor | None) -> None:
        assert self._runner is not None
        self._runner.logits(None, indices.to(self._device), adapter_slots)

    def _likeliest(self, indices: torch.Tensor, adapter_slots: torch.Tensor | None) -> None:
        assert self._runner is not None
        self._runner.likeliest(None, indices.to(self._device), adapter_slots)

    def _prepare(self, key: int, adapter: dict[str, Any]) -> None:
        from quire.executor.wire import adapter_from_message

        self._adapters[key] = self._model.prepare_adapter(adapter_from_message(adapter))

    def _set_adapter(self, slot: int, key: int | None) -> None:
        self._model.set_adapter(slot, None if key is None else self._adapters[key])

    def _drop(self, keys: list[int]) -> None:
        for key in keys:
            del self._adapters[key]


def main() -> None:
    """Run a worker."""
    run_child("rank", lambda rank, channel: Worker(rank, channel).run())


if __name__ == "__main__":
    main()
