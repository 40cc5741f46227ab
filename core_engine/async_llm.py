"""AsyncLLM: the same engine, awaitable, from any number of event loops."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sized
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from quire.config import EngineConfig, init_signature
from quire.errors import EngineClosedError, InvalidRequestError, QuireError
from quire.html import card
from quire.lifetime import describe
from quire.llm import LLM
from quire.outputs import EmbeddingRequestOutput, RequestOutput
from quire.pooling_params import PoolingParams
from quire.prompts import Prompt, as_single_prompt
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.waiting import Event, failure

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from quire.arguments import EngineArguments
    from quire.engine.loop import EngineLoop
    from quire.engine.processor import ModelLimits
    from quire.engine.request import Request
    from quire.lora_request import LoRARequest
    from quire.request_maker import FoundAdapter
    from quire.tokenizer.tokenizer import Tokenizer


_LONG_PROMPT = 4096
"""Characters, or tokens, above which a prompt is read on a thread of its own: about 1 ms."""

_MANY_WORDS = 32
"""Bad words above which these are spelled on a thread of their own, likewise."""

_POLL_SECONDS = 0.5


class AsyncLLM:
    """An engine for asyncio: each request is an asynchronous generator.

    All requests, from every task, thread and event loop, run in one batch. Nothing is bound to
    an event loop but the requests that were made in it, so that one object serves repeated
    ``asyncio.run`` and a notebook's loop alike.

    Parameters
    ----------
    model, **kwargs
        As for :class:`quire.LLM`.

    Examples
    --------
    >>> async def answer(llm: AsyncLLM, prompt: str) -> str:
    ...     async for output in llm.generate(prompt):
    ...         pass
    ...     return output.outputs[0].text
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Unpack[EngineArguments]) -> None:
        self._set_up(LLM(model, **kwargs), owns=True)

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """Return an AsyncLLM over the engine of ``llm``; the requests of both run in one batch.

        It keeps ``llm`` alive, and closing it does not close ``llm``.
        """
        self = cls.__new__(cls)
        self._set_up(llm, owns=False)
        return self

    def _set_up(self, llm: LLM, *, owns: bool) -> None:
        self._llm = llm
        self._owns = owns
        self._closed = False
        self._draining = False
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_flight: dict[str, str] = {}
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = (
            weakref.WeakKeyDictionary()
        )

    # -- generation ------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt and yield its outputs as they come.

        The request starts with the first output that is asked for. Cancelling the task that
        reads it, or closing the generator, aborts it.

        Parameters
        ----------
        prompt : str, dict or list of int
            One prompt, as in :meth:`quire.LLM.generate`.
        sampling_params : SamplingParams, optional
            ``output_kind`` says what each output holds: all of it so far (the default), what is
            new, or nothing before the end.
        request_id : str, optional
            A name for :meth:`abort`, that no other request in flight has.
        lora_request : LoRARequest or str, optional
            The adapter, or the name of one that is loaded. It is read on a thread, while others
            go on.
        priority : int
            Lower runs earlier; needs ``scheduling_policy="priority"``.

        Yields
        ------
        RequestOutput
            The last one has ``finished`` set.

        Raises
        ------
        InvalidRequestError
            The prompt, a parameter or the id is wrong.
        RequestFailedError
            The request failed while it ran.
        EngineBusyError
            As many requests wait as ``max_waiting_requests`` allows.
        EngineClosedError
            The engine was closed before or meanwhile, or is being drained.

        Each has the request's name in ``request_id``.
        """
        single = as_single_prompt(prompt)
        llm = self._taking_llm()

        def make() -> Request:
            return llm._make_request(
                single, sampling_params, lora_request=lora_request, priority=priority
            )

        words = sampling_params.bad_words if isinstance(sampling_params, SamplingParams) else None
        slow = _is_long(single) or len(words or ()) > _MANY_WORDS
        slow = slow or not llm._is_at_hand(lora_request)
        async with aclosing(self._run(llm, make, request_id, slow=slow)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Any = None,
    ) -> EmbeddingRequestOutput:
        """Turn one prompt into a vector, as :meth:`quire.LLM.embed` does.

        Cancelling the task that waits for it aborts the request. Raises what :meth:`generate`
        raises.
        """
        single = as_single_prompt(prompt)
        llm = self._taking_llm()

        def make() -> Request:
            return llm._make_embedding(single, pooling_params, lora_request)

        slow = _is_long(single) or not llm._is_at_hand(lora_request)
        async with aclosing(self._run(llm, make, request_id, slow=slow)) as outputs:
            *_, last = [output async for output in outputs]
        return EmbeddingRequestOutput.of(last)

    async def _run(
        self,
        llm: LLM,
        make: Callable[[], Request],
        request_id: str | None,
        *,
        slow: bool,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Make a request, run it, and yield its outputs; errors know its name."""
        name = uuid4().hex if request_id is None else request_id
        try:
            # What takes long to tokenize must not keep the event loop from its other requests.
            request = await asyncio.to_thread(make) if slow else make()
            loop = llm._lifetime.start()
            loop.check_may_wait()
            events: asyncio.Queue[Event] = asyncio.Queue()
            mailbox = self._mailbox(asyncio.get_running_loop())
            # The engine knows requests by numbers of the LLM; a name is for the caller alone, and
            # one that the caller does not choose must not take what another caller may.
            number = request.request_id
            self._register(name, number)
        except QuireError as error:
            error.request_id = name if isinstance(name, str) else None
            raise
        merges = request.params.output_kind is RequestOutputKind.DELTA
        ended = False
        try:
            sink = _Sink(mailbox, events, loop, number)
            longest = self.config.scheduler.max_waiting_requests
            loop.submit([(request, sink)], longest_queue=longest)
            del request  # and with it the adapter, when the engine is done with it
            while not ended:
                event = await events.get()
                # A reader that is slow finds what came meanwhile in one piece.
                while merges and not events.empty() and isinstance(event, RequestOutput):
                    later = events.get_nowait()
                    if isinstance(later, BaseException):
                        event = later
                    else:
                        event.add(later)
                if isinstance(event, BaseException):
                    ended = True
                    try:
                        failed = failure(name, event)
                        if isinstance(failed, QuireError):
                            failed.request_id = name
                        raise failed
                    finally:  # the exception has this frame, which would have the exception
                        del event, failed
                ended = event.finished
                event.request_id = name
                yield event
        finally:
            with self._lock:
                del self._in_flight[name]
                self._idle.notify_all()
            if not ended:
                loop.abort([number])

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their generators yield a last output with ``finish_reason="abort"``.

        Ids that are not in flight are passed over.
        """
        if not isinstance(request_id, Iterable):
            raise InvalidRequestError(f"request_id must be a string or several, not {request_id!r}")
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        with self._lock:
            numbers = [self._in_flight[name] for name in names if name in self._in_flight]
        if numbers:
            self._open_llm()._lifetime.start().abort(numbers)

    def _register(self, name: Any, number: str) -> str:
        """Take a request's name until it ends."""
        if not isinstance(name, str) or name == "":
            raise InvalidRequestError(f"request_id must be a string or None, not {name!r}")
        with self._lock:
            if name in self._in_flight:
                raise InvalidRequestError(f"request_id={name!r} is in flight: ids must be unique")
            self._in_flight[name] = number
        return name

    def _mailbox(self, event_loop: asyncio.AbstractEventLoop) -> _Mailbox:
        with self._lock:
            mailbox = self._mailboxes.get(event_loop)
            if mailbox is None:
                mailbox = self._mailboxes[event_loop] = _Mailbox(event_loop)
        return mailbox

    # -- adapters --------------------------------------------------------------------------------

    async def load_lora(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        load_inplace: bool = False,
        base_model_name: str | None = None,
    ) -> LoRARequest:
        """Read a LoRA adapter on a thread, as :meth:`quire.LLM.load_lora` does."""
        llm = self._open_llm()
        return await asyncio.to_thread(
            llm.load_lora, path, name, load_inplace=load_inplace, base_model_name=base_model_name
        )

    async def unload_lora(self, name: str) -> None:
        """Forget an adapter that was loaded; requests that run with it go on with it."""
        self._open_llm().unload_lora(name)

    async def list_loras(self) -> list[LoRARequest]:
        """Return the adapters that were loaded, in that order."""
        return self._open_llm().list_loras()

    async def find_lora(self, lora_request: Any) -> FoundAdapter:
        """Return an adapter as it is now, which any number of requests take in its place.

        They run with it whatever is loaded under its name meanwhile.

        Raises
        ------
        AdapterError
            There is none, or it cannot be read.
        """
        found: FoundAdapter
        llm = self._open_llm()
        if llm._is_at_hand(lora_request):
            [found] = llm._find_adapters(lora_request, 1)
        else:
            [found] = await asyncio.to_thread(llm._find_adapters, lora_request, 1)
        if found.error is not None:
            raise found.error
        return found

    async def count_lora_requests(self) -> dict[str, tuple[int, int]]:
        """Return by adapters' names how many requests with them have begun, and how many wait."""
        llm = self._may_wait()
        return await asyncio.to_thread(llm.count_lora_requests)

    # -- the model and the engine ----------------------------------------------------------------

    async def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self._open_llm().get_tokenizer()

    async def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: those the checkpoint recommends."""
        return self._open_llm().get_default_sampling_params()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: the engine runs, and nobody drains it."""
        return not (self.closed or self._draining or self.engine_error is not None)

    @property
    def engine_error(self) -> BaseException | None:
        """What the engine broke down with, if it did; it takes no more requests then."""
        loop = self._llm._lifetime.loop
        return None if loop is None else loop.broken

    @property
    def num_unfinished_requests(self) -> int:
        """Requests of this object that have not ended."""
        with self._lock:
            return len(self._in_flight)

    async def check_health(self, timeout: float | None = None) -> None:
        """Return if the engine can serve requests.

        Parameters
        ----------
        timeout : float, optional
            Seconds in which its thread has to answer, between two steps; None does not ask it.

        Raises
        ------
        EngineClosedError
            It was closed, or broke down; the message says why.
        TimeoutError
            Its thread did not answer.
        """
        llm = self._may_wait()
        broken = self.engine_error
        if broken is not None:
            raise EngineClosedError(f"the engine broke down ({type(broken).__name__}: {broken})")
        if timeout is not None:
            try:
                await asyncio.wait_for(asyncio.to_thread(llm.get_metrics), timeout)
            except asyncio.TimeoutError as error:
                raise TimeoutError(f"the engine did not answer within {timeout:g} s") from error

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that run.

        Parameters
        ----------
        timeout : float, optional
            Most seconds to wait.

        Returns
        -------
        bool
            Whether all of them have ended; :meth:`close` ends the others.
        """
        self._draining = True
        end = None if timeout is None else time.monotonic() + timeout

        def wait() -> bool:
            # In pieces: a thread that waits for ever would keep the interpreter from its end.
            while True:
                left = _POLL_SECONDS if end is None else end - time.monotonic()
                with self._lock:
                    if not self._in_flight or self.closed or left <= 0:
                        return not self._in_flight
                    self._idle.wait(min(left, _POLL_SECONDS))

        return await asyncio.to_thread(wait)

    async def get_metrics(self) -> dict[str, float]:
        """Return the engine's counters and gauges by name."""
        llm = self._may_wait()
        return await asyncio.to_thread(llm.get_metrics)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, and return True; running requests keep what they use."""
        llm = self._may_wait()
        return await asyncio.to_thread(llm.reset_prefix_cache)

    @property
    def limits(self) -> ModelLimits:
        """What a request is measured against: the vocabulary's size, the longest request."""
        return self._open_llm()._open_processor().limits

    @property
    def config(self) -> EngineConfig:
        """What the engine was made with."""
        return self._llm.config

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more requests and, unless made by :meth:`from_llm`, free the engine. Idempotent.

        Requests that run are ended: with EngineClosedError where the engine is freed, else with
        ``finish_reason="abort"``.
        """
        self._closed = True
        if self._owns:
            self._llm.close()
        elif not self._llm.closed:
            with self._lock:
                numbers = list(self._in_flight.values())
            if numbers:
                self._llm._lifetime.start().abort(numbers)

    def shutdown(self) -> None:
        """Do what :meth:`close` does, by the name that vLLM has for it."""
        self.close()

    @property
    def closed(self) -> bool:
        """Whether this object, or the LLM it was made from, was closed."""
        return self._closed or self._llm.closed

    def _open_llm(self) -> LLM:
        if self._closed:
            raise EngineClosedError(f"{self!r} was closed; make a new one")
        self._llm._lifetime.check()
        return self._llm

    def _taking_llm(self) -> LLM:
        """Return the LLM, unless no more requests are taken."""
        llm = self._open_llm()
        if self._draining:
            raise EngineClosedError(f"{self!r} is being drained: it takes no more requests")
        return llm

    def _may_wait(self) -> LLM:
        """Return the LLM, unless this is its engine's thread, which others wait for."""
        llm = self._open_llm()
        llm._lifetime.check().check_may_wait()
        return llm

    def __enter__(self) -> Self:
        self._open_llm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._open_llm()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing waits for the step that runs.
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"{type(self).__name__}(model={self.config.model.model!r}{state})"

    def _repr_html_(self) -> str:
        state = [("state", "closed")] if self.closed else []
        rows = dict([*describe(self.config, self._llm._lifetime), *state])
        return card(type(self).__name__, rows.items())


AsyncLLM.__init__.__signature__ = init_signature()  # type: ignore[attr-defined]


def _is_long(prompt: Prompt) -> bool:
    """Whether a prompt takes a while to tokenize or to check."""
    if isinstance(prompt, Mapping):
        sizes = [len(v) for v in prompt.values() if isinstance(v, Sized)]
    else:
        sizes = [len(prompt)] if isinstance(prompt, Sized) else []
    return max(sizes, default=0) > _LONG_PROMPT


class _Mailbox:
    """Carries outputs from the engine's thread into one event loop, many per wake-up.

    A wake-up costs a system call; a step brings an output to each of hundreds of requests.
    There is no lock: garbage collected while it was held could close an engine, and wait for the
    very thread that wants to put something in.
    """

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self._event_loop = weakref.ref(event_loop)  # the loop is the key of its mailbox
        self._items: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._woken = False

    def put(self, events: asyncio.Queue[Event], event: Event) -> bool:
        """Deliver an event to a queue of the event loop; return False if the loop is no more."""
        event_loop = self._event_loop()
        if event_loop is None or event_loop.is_closed():
            return False
        self._items.append((events, event))
        if not self._woken:
            self._woken = True
            try:
                event_loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed since it was asked
                return False
        return True

    def _deliver(self) -> None:
        self._woken = False  # first: what is put in from here on wakes the loop anew
        while self._items:
            events, event = self._items.popleft()
            events.put_nowait(event)


class _Sink:
    """Where the engine's thread leaves the outputs of one request.

    The request of an event loop that was closed is aborted: nobody can read it.
    """

    __slots__ = ("_events", "_loop", "_mailbox", "_number")

    def __init__(
        self, mailbox: _Mailbox, events: asyncio.Queue[Event], loop: EngineLoop, number: str
    ) -> None:
        self._mailbox = mailbox
        self._events = events
        self._loop = loop
        self._number = number

    def __call__(self, event: Event) -> None:
        if not self._mailbox.put(self._events, event):
            self._loop.abort([self._number])
