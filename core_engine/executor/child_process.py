"""ChildProcess: a process of quire's as the one that started it sees it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from quire.executor.channel import Channel, ChannelClosedError, ChannelSilentError
from quire.executor.messages import Message, MessageError

SILENT_SECONDS = 7.0
"""Without a sign of life, after which a process is taken for hung; it gives one each second."""

_FIRST_SECONDS = 60.0
"""Until the first: a disk may be slow, and a machine busy."""

_PROGRAM = """\
import sys
sys.path[:] = [path for path in sys.path if path]
from {module} import main
main()
"""
"""What ``python -m`` runs, without the current folder in front of what is imported."""


class ChildProcess:
    """A process that runs a module of quire's, and a thread that hears what it says.

    Parameters
    ----------
    module : str
        Whose ``main`` calls `quire.executor.child.run_child`.
    kind : str
        What such processes are called.
    number : int
        Which of them this is.
    fds : sequence of int
        Descriptors that it inherits, under the same numbers.
    environ : mapping of str to str
        Added to this process's environment.
    lose : callable
        Told once, from a thread, with the number and why, when the process is no more, or hangs.
    """

    def __init__(
        self,
        module: str,
        kind: str,
        number: int,
        fds: Sequence[int],
        environ: Mapping[str, str],
        lose: Callable[[int, str], None],
    ) -> None:
        self.number = number
        self.channel, other = Channel.pair()
        self.replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lose = lose
        self._is_ending = False
        command = [sys.executable, "-c", _PROGRAM.format(module=module)]
        command += ["--number", str(number)]
        command += ["--channel", str(other.fileno()), "--parent", str(os.getpid())]
        with other:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(other.fileno(), *fds),
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(_import_path()),
                    **environ,
                },
            )
        self._listener = threading.Thread(
            target=self.listen, name=f"quire-{kind}-{number}", daemon=True
        )
        self._listener.start()

    def hear(self, message: Message) -> None:
        """Take what it said, but for signs of life; on the listening thread."""
        self.replies.put(message)

    def listen(self) -> None:
        """Hear what it says until its end; what the listening thread runs."""
        why, patience = "", _FIRST_SECONDS
        try:
            while not why:
                message = self.channel.receive(patience)
                patience = SILENT_SECONDS
                if message["what"] == "failed":
                    why = f"failed: {message['kind']}: {message['text']}"
                    self.hear(message)
                elif message["what"] != "alive":
                    self.hear(message)
        except ChannelSilentError:
            why = f"gave no sign of life for {patience:g} s"
        except ChannelClosedError:
            why = self._how_it_ended()
        except MessageError as error:
            why = f"said what is no message: {error}"
        if not self._is_ending:
            self._lose(self.number, why)
        self.replies.put(None)

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with the code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    def end(self) -> None:
        """Ask it to end."""
        self._is_ending = True
        with contextlib.suppress(ChannelClosedError):
            self.channel.send({"what": "end"})

    def kill(self) -> None:
        """Bring about its end, whatever it does."""
        self.process.kill()

    def join(self, seconds: float) -> None:
        """Wait for its end, and bring it about after a while."""
        self._is_ending = True
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
        if self._listener is not threading.current_thread():
            self._listener.join()


def _import_path() -> list[str]:
    """Return where this process imports from, so that the other finds the same."""
    found = []
    for path in sys.path:
        with contextlib.suppress(FileNotFoundError):  # the current folder may be none any more
            found.append(path or os.getcwd())
    return found
