"""ReplicatedEngine: copies of an engine, one of them in this process, that look like one."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.engine.engine import request_failed
from quire.engine.interface import Later, StepOutput
from quire.engine.queue_bound import QueueBound
from quire.errors import (
    DeviceLostError,
    EngineClosedError,
    InvalidRequestError,
    ReplicaError,
    RequestFailedError,
)
from quire.replicas.replies import combine_adapters, combine_maps, combine_metrics
from quire.replicas.router import Router
from quire.replicas.wire import (
    StaysHereError,
    error_from_message,
    output_from_message,
    request_to_message,
)

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.cache_map import KVCacheMap
    from quire.engine.engine import Engine
    from quire.engine.request import Request
    from quire.executor.messages import Message
    from quire.replicas.copies import Copies
    from quire.replicas.replica_process import ReplicaProcess
    from quire.utils.threads import StepThreads

logger = logging.getLogger("quire")

_ANSWER_SECONDS = 2.0
"""How long an answer is waited for; then what a replica said last has to do."""

_OWN = 0
"""The number of this process's replica."""


@dataclass(slots=True)
class _Flight:
    """A request in flight: where, and how many sequences it takes there."""

    request: Request
    replica: int
    num_sequences: int
    is_aborted: bool = False


class ReplicatedEngine:
    """Divides requests among copies of an engine.

    Not thread-safe: one :class:`~quire.engine.loop.EngineLoop` owns it, which steps the copy of
    this process. The others step themselves, and what they say lies ready until the next step.

    Parameters
    ----------
    config : EngineConfig
    own : Engine
        The copy in this process.
    copies : Copies
        The others.
    threads : StepThreads
        What the copy in this process computes with.

    Attributes
    ----------
    wake : callable or None
        Called from any thread when a step has something to do that it had not.
    """

    def __init__(
        self, config: EngineConfig, own: Engine, copies: Copies, threads: StepThreads
    ) -> None:
        self.config = config
        self.tokenizer = own.tokenizer
        self.limits = own.limits
        self.processor = own.processor
        self.adapters = own.adapters
        self.lost_adapters = own.lost_adapters
        self.own = own
        self._copies = copies
        self._threads = threads
        self._seats = config.scheduler.max_num_seqs
        self._loads: list[int | None] = [0] * copies.count
        self._router = Router(
            copies.count,
            seats=self._seats,
            block_size=config.cache.block_size,
            shares_prefixes=config.cache.enable_prefix_caching,
        )
        self._queue_bound = QueueBound()
        self._flights: dict[str, _Flight] = {}
        self._watched: set[str] = set()
        self._num_failed = 0
        self._pid = os.getpid()
        self._is_closed = False

    @property
    def wake(self) -> Callable[[], None] | None:
        """What is called when there is news."""
        return self._copies.wake

    @wake.setter
    def wake(self, function: Callable[[], None] | None) -> None:
        self._copies.wake = function

    # -- requests ------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """KV blocks that requests can use, in all replicas."""
        return self.own.num_blocks * self._copies.count

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.own.has_work or bool(self._copies.news)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._flights)

    def check_queue(self, longest: int) -> None:
        """Refuse one more request where no replica has room, and as many as this have to wait.

        Raises
        ------
        EngineBusyError
        """
        loads = [load for load in self._loads if load is not None]
        if min(loads) >= self._seats:
            others = [load for load in self._loads[1:] if load is not None]
            queued = self.own.num_queued + sum(max(0, load - self._seats) for load in others)
            self._queue_bound.check(queued, longest)

    def add_request(self, request: Request) -> None:
        """Queue a request, here or at another replica.

        Raises
        ------
        InvalidRequestError
            If a request of that id is in flight, or it asks for what none can do.
        EngineClosedError
            After :meth:`close`, and in a fork of the process that made the engine.
        """
        if self._is_closed:
            raise EngineClosedError("the engine is closed: make a new one")
        if self._pid != os.getpid():
            raise EngineClosedError(
                f"the engine has processes that belong to process {self._pid}, of which this one "
                "is a fork: make a new one here"
            )
        if request.request_id in self._flights:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in flight already: ids must be unique"
            )
        number = _OWN
        if not request.params.logits_processors:  # which are this process's
            lost = self._copies.lost  # also those of which the news was not read yet
            loads = [None if i in lost else load for i, load in enumerate(self._loads)]
            number = self._router.route(request, loads)
        if number != _OWN:
            self.own.check_request(request)
            try:
                self._send(request, self._replica(number))
            except StaysHereError:
                number = _OWN
                self._router.note(request, _OWN)
        if number == _OWN:
            self.own.add_request(request)
        flight = _Flight(request, number, request.params.num_sequences)
        self._flights[request.request_id] = flight
        self._count(flight, +1)

    def _send(self, request: Request, replica: ReplicaProcess) -> None:
        adapter = request.adapter
        folder = None if adapter is None else self.adapters.folder_of(adapter.digest)
        message = request_to_message(request, folder)
        replica.outbox.put({"what": "submit", "request": message})
        if adapter is not None and adapter.digest not in self._watched:
            self._watched.add(adapter.digest)
            # When nobody here needs it any more, nobody elsewhere is to keep it.
            weakref.finalize(
                adapter, _forget_adapter, adapter.digest, self._watched, self._copies
            ).atexit = False

    def abort(self, request_ids: Iterable[str]) -> list[StepOutput]:
        """End requests; what other replicas have to say of theirs comes with a step."""
        by_replica: dict[int, list[str]] = {}
        for request_id in request_ids:
            flight = self._flights.get(request_id)
            if flight is not None:
                flight.is_aborted = True
                by_replica.setdefault(flight.replica, []).append(request_id)
        outputs = self._ended(self.own.abort(by_replica.pop(_OWN, [])))
        for number, ids in by_replica.items():
            self._replica(number).outbox.put({"what": "abort", "ids": ids})
        return outputs

    # -- the step ------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Take what the others said, and compute one step of this process's replica.

        Where that breaks down, the requests of this replica end with it, and no others.
        """
        self._threads.use()
        outputs = self._take_news()
        if self.own.has_work:
            try:
                outputs += self._ended(self.own.step())
            except DeviceLostError:  # nothing can run here any more
                raise
            except BaseException as error:
                logger.exception("a step broke down; what is in flight in this process ends")
                outputs += self._restart_own(error)
        return outputs

    def _restart_own(self, error: BaseException) -> list[StepOutput]:
        outputs = self._ended(self.own.restart(error))
        left = [id_ for id_, flight in self._flights.items() if flight.replica == _OWN]
        return outputs + self._ended(request_failed(id_, error) for id_ in left)

    def restart(self, error: BaseException) -> list[StepOutput]:
        """End every request in flight with an error, and begin with new books."""
        outputs = self._restart_own(error)
        left = list(self._flights)
        self.abort(left)
        return outputs + self._ended(request_failed(id_, error) for id_ in left)

    def _take_news(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        news = self._copies.news
        while news:
            number, message = news.popleft()
            if message is None:
                outputs += self._lose(number)
                continue
            flight = self._flights.get(message["id"])
            if flight is not None and flight.replica == number:
                outputs += self._ended(self._read(flight, message))
        return outputs

    def _read(self, flight: _Flight, message: Message) -> list[StepOutput]:
        """Return what a replica says of a request."""
        request = flight.request
        if message["what"] == "output":
            return [output_from_message(message["output"], request)]
        if message["what"] == "failed_request":
            return [error_from_message(message["error"], request.request_id)]
        assert message["what"] == "no_adapter", message["what"]
        # Here it is in memory, whatever became of its folder.
        logger.warning(
            "replica %d cannot read an adapter that this process has, which serves it from here "
            "on: %s",
            flight.replica,
            message["why"],
        )
        self._count(flight, -1)
        flight.replica = _OWN
        self._count(flight, +1)
        try:
            self.own.add_request(request)
        except Exception as error:
            return [request_failed(request.request_id, error)]
        return self.own.abort([request.request_id]) if flight.is_aborted else []

    def _lose(self, number: int) -> list[StepOutput]:
        """End what a replica had that is no more."""
        error = ReplicaError(number, self._copies.lost[number])
        self._loads[number] = None
        self._router.forget(number)
        ids = [id_ for id_, flight in self._flights.items() if flight.replica == number]
        self._num_failed += len(ids)
        logger.error(
            "%s; %d requests end with it, and %d of %d replicas go on",
            error,
            len(ids),
            self._num_live,
            self._copies.count,
        )
        return self._ended(request_failed(id_, error) for id_ in ids)

    @property
    def _num_live(self) -> int:
        return sum(load is not None for load in self._loads)

    def _ended(self, outputs: Iterable[StepOutput]) -> list[StepOutput]:
        """Count the requests out of which these are the last outputs."""
        outputs = list(outputs)
        for output in outputs:
            if isinstance(output, RequestFailedError) or output.finished:
                flight = self._flights.pop(output.request_id, None)
                if flight is not None:
                    self._count(flight, -1)
                    self._queue_bound.note_end()
        return outputs

    def _count(self, flight: _Flight, sign: int) -> None:
        load = self._loads[flight.replica]
        if load is not None:
            self._loads[flight.replica] = load + sign * flight.num_sequences

    def _replica(self, number: int) -> ReplicaProcess:
        return self._copies.replicas[number - 1]

    # -- the rest ------------------------------------------------------------------------------

    def release_adapters(self) -> None:
        """Let the memory of adapters go that nobody needs any more."""
        self.own.release_adapters()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests in flight keep their blocks."""
        self._router.forget()
        for replica in self._others():
            replica.outbox.put({"what": "reset"})
        return self.own.reset_prefix_cache()

    def kv_cache_map(self) -> Later[KVCacheMap]:
        """Return which block of the KV caches holds what, replica by replica."""
        own = self.own.kv_cache_map()
        asked = [replica.ask("kv_cache_map") for replica in self._others()]
        return Later(lambda: combine_maps(own, _answers(asked)))

    def metrics(self) -> dict[str, float] | Later[dict[str, float]]:
        """Return the sums of counters since the start, and gauges of this moment."""
        own = self.own.metrics()
        exact = {
            "num_replicas": float(self._num_live),
            "num_unfinished_requests": float(len(self._flights)),
        }
        own["num_failed_requests"] += self._num_failed
        live = self._others()
        lost = [r.last_metrics for r in self._copies.replicas if self._loads[r.number] is None]
        asked = [replica.ask("metrics") for replica in live]

        def finish() -> dict[str, float]:
            for replica, answer in zip(live, _answers(asked), strict=True):
                replica.last_metrics = answer or replica.last_metrics
            found = [own, *(replica.last_metrics for replica in live)]
            return {**combine_metrics(found, lost), **exact}

        return Later(finish)

    def count_adapters(self) -> Later[dict[str, tuple[int, int]]]:
        """Return by adapters' names how many requests with them have begun, and how many wait."""
        own = self.own.count_adapters()
        asked = [replica.ask("count_adapters") for replica in self._others()]
        return Later(lambda: combine_adapters(own, _answers(asked)))

    def _others(self) -> list[ReplicaProcess]:
        """Return the other replicas that can be asked."""
        if self._is_closed or self._pid != os.getpid():
            return []
        return [r for r in self._copies.replicas if self._loads[r.number] is not None]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the engine's books agree with each other."""
        self.own.check_integrity()
        for number, load in enumerate(self._loads):
            held = [f.num_sequences for f in self._flights.values() if f.replica == number]
            assert load in (None, sum(held)), f"replica {number}: {load} counted, {held} in flight"

    def close(self) -> None:
        """Drop all requests, let weights and KV cache go, and end the other processes."""
        is_first, self._is_closed = not self._is_closed, True
        if is_first:
            self._copies.start_ending()
        try:
            self.own.close()
        finally:
            if is_first:
                self._copies.close()
                self._flights.clear()
                self._threads.give_back()


def _forget_adapter(digest: str, watched: set[str], copies: Copies) -> None:
    watched.discard(digest)
    for replica in copies.replicas:
        replica.outbox.put({"what": "forget", "digest": digest})


def _answers(asked: list[Callable[[float], Any]]) -> list[Any]:
    until = time.monotonic() + _ANSWER_SECONDS
    return [wait(until) for wait in asked]
