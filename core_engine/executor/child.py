"""What a process that another one of quire's has started does to be told things, and to end."""

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
from collections.abc import Callable

from quire.errors import QuireError
from quire.executor.channel import Channel, ChannelClosedError

ALIVE_SECONDS = 1.0
"""From one sign of life to the next."""

_FAREWELL_SECONDS = 2.0


def _watch(channel: Channel, parent: int) -> None:
    """Tell that this process lives, and end it when nobody is left to be told.

    The end of the connection is not enough: processes that the parent has forked hold it, too.
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


def run_child(kind: str, run: Callable[[int, Channel], None]) -> None:
    """Run what a child process is there for; its parent started it by a `ChildProcess`.

    Parameters
    ----------
    kind
        What such processes are called, each with its number.
    run
        Told its number, and the channel to its parent.
    """
    parser = argparse.ArgumentParser()
    for name in ("number", "channel", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    # Who is at the keyboard means the parent, which ends this process in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=arguments.channel))
    threading.Thread(target=_watch, args=(channel, arguments.parent), daemon=True).start()
    try:
        from quire.utils import log

        log.configure(f"{kind} {arguments.number}")
        run(arguments.number, channel)
    except ChannelClosedError:
        sys.exit(1)
    except BaseException as error:
        with contextlib.suppress(ChannelClosedError):
            channel.send({"what": "failed", "kind": type(error).__name__, "text": str(error)})
        if isinstance(error, QuireError):  # which says all there is to say
            sys.exit(1)
        raise
