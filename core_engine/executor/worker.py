"""The program of a worker process: a rank of a model that is not the engine's own.

It is started as ``python -m quire.executor.worker`` with the end of a channel, over which it is
told everything else; it ends when it is told to, or when nobody is at the other end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

from quire.errors import QuireError
from quire.executor.channel import Channel, ChannelClosedError

ALIVE_SECONDS = 1.0
"""From one sign of life to the next."""

_FAREWELL_SECONDS = 2.0


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
        keep_to_own_cores(rank, place.size)
        torch.set_num_threads(settings.num_threads)
    ends = connect(message["connections"], place, device)
    told = ToldRank(settings, place, device, ends, channel.send)
    while told.do(channel.receive()):
        pass


def _watch(channel: Channel, parent: int) -> None:
    """Tell that this process lives, and end it when nobody is left to be told.

    The end of the connection is not enough: processes that the engine's has forked hold it, too.
    """
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    while os.getppid() == parent and not poller.poll(ALIVE_SECONDS * 1000):
        try:
            channel.send({"what": "alive"})
        except ChannelClosedError:
            break
    time.sleep(_FAREWELL_SECONDS)  # the main thread may be about to end in order
    os._exit(1)


def main() -> None:
    """Run a worker."""
    parser = argparse.ArgumentParser(prog="python -m quire.executor.worker")
    for name in ("rank", "channel", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    # Who is at the keyboard means the engine's process, which ends this one in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=arguments.channel))
    watcher = threading.Thread(target=_watch, args=(channel, arguments.parent), daemon=True)
    watcher.start()
    try:
        from quire.utils import log

        log.configure(f"rank {arguments.rank}")
        run(arguments.rank, channel)
    except ChannelClosedError:
        sys.exit(1)
    except BaseException as error:
        with contextlib.suppress(ChannelClosedError):
            channel.send({"what": "failed", "kind": type(error).__name__, "text": str(error)})
        if isinstance(error, QuireError):  # which says all there is to say
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
