"""The program of a worker process: a rank of a model that is not the engine's own.

It is started with the end of a channel, over which it is told everything else; it ends when it is
told to, or when nobody is at the other end.
"""

from __future__ import annotations

from quire.executor.channel import Channel
from quire.executor.child import run_child


def run(rank: int, channel: Channel) -> None:
    """Do what the channel brings, until that is to end."""
    import torch

    from quire.executor.connect import connect
    from quire.executor.shard import ShardSettings
    from quire.executor.told_rank import ToldRank
    from quire.utils.cores import keep_to_own_cores

    message = channel.receive()
    settings = ShardSettings(**message["settings"])
    place, device = settings.place(rank), settings.device(rank)
    if device.type == "cpu":
        keep_to_own_cores(0, settings.num_replicas)
        keep_to_own_cores(rank, place.size)
        torch.set_num_threads(settings.num_threads)
    ends = connect(message["connections"], place, device)
    told = ToldRank(settings, place, device, ends, channel.send)
    while told.do(channel.receive()):
        pass


def main() -> None:
    """Run a worker."""
    run_child("rank", run)
