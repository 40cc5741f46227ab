"""ConstraintCompiler: grammars made ready on a thread of their own, within a deadline."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.errors import InvalidRequestError
from quire.structured.backends import load_constraint_backend
from quire.structured.dropping import compile_dropping

if TYPE_CHECKING:
    from quire.structured.constraint import CompiledConstraint, ConstraintBackend
    from quire.structured.validator import Validator
    from quire.structured.vocabulary import Vocabulary
    from quire.structured_outputs import ConstraintSpec

_MOST_STRAYS = 4
"""Threads past their deadline that may still be at work when another is started."""

_STACK_BYTES = 256 * 2**20
"""Of a compiling thread, as address space: the libraries walk through grammars by recursion."""

Key = tuple[str, "ConstraintSpec"]


class Compilation:
    """A constraint that is being made ready, for all requests that ask for it meanwhile.

    Attributes
    ----------
    done : bool
        Set last, when either of the following is.
    compiled : CompiledConstraint or None
    error : BaseException or None
    validator : Validator or None
        What finished texts have to be held against besides.
    """

    def __init__(self, backend: str, spec: ConstraintSpec) -> None:
        self.backend = backend
        self.spec = spec
        self.done = False
        self.compiled: CompiledConstraint | None = None
        self.error: BaseException | None = None
        self.validator: Validator | None = None
        self.clock = time.monotonic()  # when it was queued, then when its thread took it up
        self.running = False


class ConstraintCompiler:
    """Compile each constraint once, beside the steps of an engine.

    One thread compiles, for as long as there is something to. No thread can be ended from
    outside: one that overruns its deadline is left to itself, its request fails, and another
    takes over the queue. The libraries bound their own work, so that it ends at some time.

    Parameters
    ----------
    make_vocabulary : callable
        Called once, by the thread: it takes as long as the vocabulary is large.
    deadline : float
        Seconds for a compilation.
    capacity : int, default 128
        Compiled constraints that are kept; the one least recently used goes.
    load_backend : callable, optional
        Takes a backend's name, the vocabulary and the deadline.
    """

    def __init__(
        self,
        make_vocabulary: Callable[[], Vocabulary],
        *,
        deadline: float,
        capacity: int = 128,
        load_backend: Callable[
            [str, Vocabulary, float], ConstraintBackend
        ] = load_constraint_backend,
    ) -> None:
        self.deadline = deadline
        self._make_vocabulary = make_vocabulary
        self._load_backend = load_backend
        self._capacity = capacity
        self._vocabulary: Vocabulary | None = None
        self._backends: dict[str, ConstraintBackend] = {}
        self._changed = threading.Condition()
        self._cache: OrderedDict[Key, Compilation] = OrderedDict()
        self._queue: deque[Compilation] = deque()
        self._current: Compilation | None = None  # what the thread in charge is at
        self._has_worker = False
        self._num_strays = 0

    def submit(self, backend: str, spec: ConstraintSpec) -> Compilation:
        """Return a constraint's compilation, from the cache or begun now."""
        key = (backend, spec)
        with self._changed:
            found = self._cache.get(key)
            if found is not None and found.error is None:
                self._cache.move_to_end(key)
                return found
            made = self._cache[key] = Compilation(backend, spec)
            self._cache.move_to_end(key)
            while len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
            self._queue.append(made)
            self._start_worker()
            return made

    def expire(self) -> None:
        """End the compilations that are past their deadline."""
        with self._changed:
            now = time.monotonic()
            current = self._current
            if current is not None and current.running and now - current.clock > self.deadline:
                self._finish(
                    current,
                    error=InvalidRequestError(
                        f"{current.spec.kind} took longer to compile than "
                        f"structured_outputs_deadline={self.deadline:g} seconds"
                    ),
                )
                self._current = None
                self._num_strays += 1
                self._has_worker = False
                self._start_worker()
            while (
                self._queue and not self._has_worker and now - self._queue[0].clock > self.deadline
            ):
                waiting = self._queue.popleft()
                self._finish(
                    waiting,
                    error=InvalidRequestError(
                        f"{waiting.spec.kind} was not compiled within "
                        f"structured_outputs_deadline={self.deadline:g} seconds: "
                        f"{self._num_strays} other constraints are still at it, past theirs"
                    ),
                )

    def wait(self, seconds: float) -> None:
        """Return when a compilation ends, or after some seconds."""
        with self._changed:
            if self._queue or self._current is not None:
                self._changed.wait(seconds)

    def close(self) -> None:
        """Forget everything; what is being compiled is of no use any more."""
        with self._changed:
            self._queue.clear()
            self._cache.clear()

    # -- under the lock ------------------------------------------------------------------------

    def _start_worker(self) -> None:
        if self._has_worker or not self._queue or self._num_strays >= _MOST_STRAYS:
            return
        self._has_worker = True
        previous = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._work, name="quire-compiler", daemon=True).start()
        finally:
            threading.stack_size(previous)

    def _finish(
        self,
        compilation: Compilation,
        *,
        compiled: CompiledConstraint | None = None,
        error: BaseException | None = None,
    ) -> None:
        compilation.compiled, compilation.error = compiled, error
        compilation.done = True
        self._changed.notify_all()

    # -- the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._has_worker = False
                    return
                current = self._current = self._queue.popleft()
            compiled = error = None
            try:
                compiled = self._compile(current)
            except BaseException as raised:  # a panic of a library is no Exception
                error = raised.with_traceback(None)
            with self._changed:
                if current.done:  # too late
                    self._num_strays -= 1
                    self._start_worker()
                    return
                self._current = None
                self._finish(current, compiled=compiled, error=error)

    def _compile(self, compilation: Compilation) -> CompiledConstraint:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        backend = self._backends.get(compilation.backend)
        if backend is None:
            backend = self._load_backend(compilation.backend, self._vocabulary, self.deadline)
            self._backends[compilation.backend] = backend
        with self._changed:
            compilation.clock = time.monotonic()
            compilation.running = True
        if not compilation.spec.drop_unsupported:
            return backend.compile(compilation.spec)
        compiled, compilation.validator = compile_dropping(
            compilation.backend, backend, compilation.spec, self._vocabulary
        )
        return compiled
