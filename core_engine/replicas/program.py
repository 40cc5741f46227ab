"""The program of a replica: a whole engine with its loop, that is not the caller's own.

It is started with the end of a channel, over which it is
told everything else; it ends when it is told to, or when nobody is at the other end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.executor.channel import Channel, ChannelClosedError
from quire.executor.child import run_child
from quire.executor.messages import Message, MessageError

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.engine.interface import AnyEngine
    from quire.engine.request import Request
    from quire.outputs import RequestOutput
    from quire.utils.memory import KVCachePlan

QUESTIONS = frozenset({"metrics", "kv_cache_map", "count_adapters"})
"""What can be asked of a replica."""


class OtherCopy:
    """The place of this process among the copies of an engine.

    Parameters
    ----------
    channel : Channel
        To the first copy's process.
    count : int
        Of all copies.
    """

    def __init__(self, channel: Channel, count: int) -> None:
        self.count = count
        self.cores_shared_by = 1  # it keeps to its own
        self._channel = channel

    def agree(self, make: Callable[[], KVCachePlan]) -> KVCachePlan:
        """Return the plan that all go by."""
        from quire.utils.memory import KVCachePlan

        self._channel.send({"what": "loaded"})
        _receive(self._channel, "measure")
        self._channel.send({"what": "planned", "plan": dataclasses.asdict(make())})
        return KVCachePlan(**_receive(self._channel, "go_by")["plan"])


class Replica:
    """Runs an engine by what it is told.

    Parameters
    ----------
    engine : Engine
    channel : Channel
    """

    def __init__(self, engine: Engine, channel: Channel) -> None:
        from quire.engine.loop import loop_for
        from quire.replicas.outbox import Outbox

        self._channel = channel
        self._store = engine.adapters
        self._loop = loop_for(engine)
        self._outbox = Outbox(channel)
        # One thread reads adapters, while other requests go on.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="quire-adapters")
        self._lock = threading.Lock()
        self._reading: set[str] = set()
        self._aborted: set[str] = set()

    def run(self) -> None:
        """Do what is told, until that is to end."""
        from quire.replicas.outbox import messages_of

        self._channel.send({"what": "ready"})
        is_open = True
        while is_open:
            for message in messages_of(_receive(self._channel, "batch")):
                if message["what"] == "end":
                    is_open = False
                    break
                self._do(message)
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._loop.close()
        self._outbox.close(1.0)

    def _do(self, message: Message) -> None:
        what = message["what"]
        if what == "submit":
            self._take(message["request"])
        elif what == "abort":
            self._abort(message["ids"])
        elif what == "ask" and message["about"] in QUESTIONS:
            self._loop.post(partial(self._answer, message["about"], message["number"]))
        elif what == "reset":
            self._loop.post(_reset)
        elif what == "forget":
            self._store.let_go(message["digest"])
        else:
            raise MessageError(f"a replica does not know what {what!r} is")

    # -- requests ------------------------------------------------------------------------------

    def _take(self, message: Message) -> None:
        from quire.replicas.wire import request_from_message

        request = request_from_message(message)
        wanted = message.get("adapter")
        if wanted is not None:
            request.adapter = self._store.in_memory(wanted["digest"])
        if wanted is None or request.adapter is not None:
            self._submit(request)
            return
        with self._lock:
            self._reading.add(request.request_id)
        self._reader.submit(self._read, request, wanted["folder"], wanted["digest"])

    def _read(self, request: Request, folder: str, digest: str) -> None:
        """Read a request's adapter, and let the request begin."""
        from quire.errors import AdapterError
        from quire.lora_request import LoRARequest

        why = ""
        try:
            adapter = self._store.in_memory(digest)
            if adapter is None:
                adapter = self._store.resolve(LoRARequest("adapter", lora_path=folder))
            assert adapter is not None
            if adapter.digest == digest:
                request.adapter = adapter
            else:
                why = f"{folder} has changed since it was read there"
        except AdapterError as error:
            why = str(error)
        except BaseException as error:  # a thread's would be lost
            why = f"{type(error).__name__}: {error}"
        with self._lock:
            self._reading.discard(request.request_id)
            is_aborted = request.request_id in self._aborted
            self._aborted.discard(request.request_id)
            if not why:
                self._submit(request)
        if why:
            self._outbox.put({"what": "no_adapter", "id": request.request_id, "why": why})
        elif is_aborted:
            self._loop.abort([request.request_id])

    def _submit(self, request: Request) -> None:
        from quire.errors import EngineClosedError

        try:
            self._loop.submit([(request, partial(self._tell, request.request_id))])
        except EngineClosedError as error:
            self._tell(request.request_id, error)

    def _abort(self, ids: list[str]) -> None:
        with self._lock:
            self._aborted.update(self._reading.intersection(ids))
        self._loop.abort(ids)

    def _tell(self, request_id: str, news: RequestOutput | BaseException) -> None:
        """Say what becomes of a request; on the loop's thread."""
        from quire.replicas.wire import error_to_message, output_to_message

        broken = self._loop.broken
        if broken is not None:
            self._break_down(broken)
        if isinstance(news, BaseException):
            error = error_to_message(news)
            self._outbox.put({"what": "failed_request", "id": request_id, "error": error})
        else:
            output = output_to_message(news)
            self._outbox.put({"what": "output", "id": request_id, "output": output})

    def _break_down(self, error: BaseException) -> None:
        """End the process: its engine is no more."""
        text = str(error)
        with contextlib.suppress(ChannelClosedError):
            self._channel.send({"what": "failed", "kind": type(error).__name__, "text": text})
        os._exit(1)

    # -- questions -----------------------------------------------------------------------------

    def _answer(self, about: str, number: int, engine: AnyEngine) -> None:
        from quire.replicas.wire import cache_map_to_message

        answer: Any
        try:
            answer = getattr(engine, about)()
            if about == "kv_cache_map":
                answer = cache_map_to_message(answer)
        except Exception:  # the loop is not to end by it
            answer = None
        self._outbox.put({"what": "answer", "number": number, "answer": answer})


def _reset(engine: AnyEngine) -> None:
    engine.reset_prefix_cache()


def _receive(channel: Channel, what: str) -> Message:
    """Wait for a message of one kind.

    Raises
    ------
    ChannelClosedError
        It is to end.
    MessageError
        Another came.
    """
    message = channel.receive()
    if message["what"] == what:
        return message
    if message["what"] == "batch":  # before it is ready it can be told to end, and nothing else
        raise ChannelClosedError("it is to end")
    raise MessageError(f"a replica waits for {what!r}, and {message['what']!r} came")


def serve(number: int, channel: Channel) -> None:
    """Build an engine by the first message, and run it by those that follow."""
    message = _receive(channel, "start")
    from quire.assembly import build_engine
    from quire.replicas.arguments import config_from_message
    from quire.utils.cores import keep_to_own_cores
    from quire.utils.device import choose_device

    config = config_from_message(message["arguments"])
    if choose_device(config.device).type == "cpu":
        keep_to_own_cores(number, message["count"])
    engine = build_engine(config, OtherCopy(channel, message["count"]))
    Replica(engine, channel).run()


def main() -> None:
    """Run a replica."""
    run_child("replica", serve)
