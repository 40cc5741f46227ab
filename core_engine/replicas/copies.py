"""Copies: the other copies of an engine, started, agreed with, and ended."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire import errors
from quire.errors import ConfigError, QuireError, ReplicaError
from quire.executor.messages import Message
from quire.replicas.arguments import arguments_to_message
from quire.replicas.replica_process import ReplicaProcess
from quire.utils.log import get_logger
from quire.utils.memory import KVCachePlan

if TYPE_CHECKING:
    import torch

    from quire.config import EngineConfig

logger = get_logger(__name__)

_END_SECONDS = 5.0


class Copies:
    """All copies of an engine but the one in this process.

    They begin to load the model at once, beside this process.

    Parameters
    ----------
    config : EngineConfig
        With ``data_parallel_size``.
    device : torch.device
        Of this process's copy.
    num_threads : int
        Of each copy, on a CPU.

    Attributes
    ----------
    count : int
        Of all of them.
    replicas : list of ReplicaProcess
    news : deque
        What they say of requests, with their numbers, in order; ``None`` in place of a message
        when one is lost.
    wake : callable or None
        Called from a thread when there is news.
    lost : dict of int to str
        Why, by number.
    """

    def __init__(self, config: EngineConfig, device: torch.device, num_threads: int) -> None:
        arguments = arguments_to_message(config)
        self.count = self.cores_shared_by = config.parallel.data_parallel_size
        self.replicas: list[ReplicaProcess] = []
        self.news: deque[tuple[int, Message | None]] = deque()
        self.wake: Callable[[], None] | None = None
        self.lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._pid = os.getpid()
        environs = _environs(config, device, num_threads)
        if device.type != "cpu":
            arguments["device"] = device.type
        try:
            for number in range(1, self.count):
                replica = ReplicaProcess(number, environs[number], self._lose, self._tell)
                self.replicas.append(replica)
                replica.channel.send({"what": "start", "arguments": arguments, "count": self.count})
        except BaseException:
            self.close(at_once=True)
            raise

    def agree(self, make: Callable[[], KVCachePlan]) -> KVCachePlan:
        """Return the smallest of the plans that all make when all have loaded their weights."""
        self._collect("loaded")
        for replica in self.replicas:
            replica.channel.send({"what": "measure"})
        plans = [make(), *(KVCachePlan(**each["plan"]) for each in self._collect("planned"))]
        plan = min(plans, key=lambda each: each.num_blocks)
        for replica in self.replicas:
            replica.channel.send({"what": "go_by", "plan": dataclasses.asdict(plan)})
        return plan

    def wait_until_ready(self) -> None:
        """Wait until they take requests."""
        self._collect("ready")

    def _collect(self, what: str) -> list[Message]:
        """Wait for an answer of each.

        Raises
        ------
        QuireError
            One failed; of the type that it was of there.
        """
        answers = []
        for replica in self.replicas:
            answer = replica.replies.get()
            if answer is None:
                why = self.lost.get(replica.number, "ended before it was ready")
                raise ReplicaError(replica.number, why)
            if answer["what"] == "failed":
                raise _failure(replica.number, answer)
            assert answer["what"] == what, answer["what"]
            answers.append(answer)
        return answers

    def _lose(self, number: int, why: str) -> None:
        with self._lock:
            if self._is_closed:
                return
            self.lost[number] = why
        replica = next((each for each in self.replicas if each.number == number), None)
        if replica is not None:
            replica.kill()  # it may only hang
        self._tell(number, None)

    def _tell(self, number: int, message: Message | None) -> None:
        self.news.append((number, message))
        wake = self.wake
        if wake is not None:
            wake()

    def start_ending(self) -> None:
        """Ask all to end."""
        with self._lock:
            self._is_closed = True
        if self._pid == os.getpid():
            for replica in self.replicas:
                replica.end()

    def close(self, *, at_once: bool = False) -> None:
        """End all of them; those that do not are killed."""
        if self._pid != os.getpid():  # in a fork they are the other process's
            return
        self.start_ending()
        end = time.monotonic() + (0.0 if at_once else _END_SECONDS)
        for replica in self.replicas:
            over = at_once or replica.number in self.lost
            replica.join(0.0 if over else max(0.0, end - time.monotonic()))


def _failure(number: int, answer: Message) -> QuireError:
    kind = getattr(errors, answer["kind"], None)
    if isinstance(kind, type) and issubclass(kind, QuireError):
        try:
            return kind(f"replica {number}: {answer['text']}")
        except TypeError:  # one that is made of other things than a text
            pass
    return ReplicaError(number, f"failed: {answer['kind']}: {answer['text']}")


def _environs(config: EngineConfig, device: torch.device, num_threads: int) -> list[dict[str, str]]:
    """Return what is said to the process of each copy by its environment.

    Raises
    ------
    ConfigError
        There are fewer devices than ranks of all copies.
    """
    parallel = config.parallel
    count, each = parallel.data_parallel_size, parallel.num_ranks
    if device.type == "cpu":
        return [{"OMP_NUM_THREADS": str(num_threads)}] * count
    from quire.utils.device import VISIBLE, count_devices

    if device.index is not None:
        raise ConfigError(
            f"device={config.device!r} is one device, and data_parallel_size={count} needs "
            f"{count * each}: use device={device.type!r}"
        )
    found = count_devices(device.type)
    if found < count * each:
        raise ConfigError(
            f"data_parallel_size={count} times {each} ranks need {count * each} devices, and "
            f"torch finds {found} of type {device.type!r} here"
        )
    variable = VISIBLE.get(device.type)
    if variable is None:
        raise ConfigError(
            f"device={device.type!r}: it is not known by which variable a process is shown some "
            f"of its devices, so data_parallel_size={count} cannot be; known: {', '.join(VISIBLE)}"
        )
    given = os.environ.get(variable)
    names = given.split(",") if given else [str(i) for i in range(found)]
    return [{variable: ",".join(names[i * each : (i + 1) * each])} for i in range(count)]
