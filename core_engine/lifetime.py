"""Lifetime: an engine from its making to its end, over forks of its process."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from quire.errors import EngineClosedError
from quire.utils import forks
from quire.utils.progress import quiet_tqdm

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.loop import EngineLoop


def make_loop(config: EngineConfig) -> EngineLoop:
    """Load a model and make its engine, with a loop that has not started."""
    return forks.compute(lambda: _make_loop(config))


def _make_loop(config: EngineConfig) -> EngineLoop:
    from quire.engine.loop import loop_for
    from quire.replicas.build import build
    from quire.replicas.replicated_engine import ReplicatedEngine

    quiet_tqdm()  # before the hub's library
    engine = build(config)
    loop = loop_for(engine)
    if isinstance(engine, ReplicatedEngine):
        known = weakref.ref(loop)

        def wake() -> None:
            if (loop := known()) is not None:
                loop.wake()

        engine.wake = wake
    return loop


def describe(config: EngineConfig, lifetime: Lifetime) -> list[tuple[str, object]]:
    """Return what a notebook shows of an engine, which is neither started nor waited for."""
    rows: list[tuple[str, object]] = [("model", config.model.model)]
    loop = lifetime.loop
    if loop is None:
        return [*rows, ("state", "closed")]
    if loop.broken is not None:
        return [*rows, ("state", f"broke down: {type(loop.broken).__name__}: {loop.broken}")]
    with suppress(EngineClosedError):  # closed in between
        engine = loop.engine
        rows += [
            ("state", "open"),
            ("longest request", f"{engine.limits.max_model_len:,} tokens"),
            ("KV cache", f"{engine.num_blocks:,} blocks of {config.cache.block_size} tokens"),
        ]
    return rows


class Lifetime:
    """What of an LLM outlives it: enough to close the engine, and no way back to the LLM.

    Parameters
    ----------
    loop : EngineLoop
    name : str
        The LLM, as error messages call it.
    bound : bool
        Whether the engine is this process's from the beginning, and not of that which first uses
        it: processes beside it are told by one, and end with it.
    """

    __slots__ = ("_is_bound", "_loop", "_name", "_pid", "_suspended")

    def __init__(self, loop: EngineLoop, name: str, *, bound: bool = False) -> None:
        self._loop: EngineLoop | None = loop
        self._name = name
        # The process whose thread steps the engine, once there is one.
        self._pid: int | None = os.getpid() if bound else None
        self._is_bound = bound
        self._suspended = ""

    @property
    def loop(self) -> EngineLoop | None:
        """The loop, None after :meth:`close`."""
        return self._loop

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._loop is None and not self._suspended

    @property
    def is_suspended(self) -> bool:
        """Whether there is no engine, and there is to be one again."""
        return bool(self._suspended)

    def check(self) -> EngineLoop:
        """Return the loop if it can serve a request.

        Raises
        ------
        EngineClosedError
            After :meth:`close`, and in a fork of the process that runs the engine.
        """
        loop = self._loop
        if loop is None and self._suspended:
            raise EngineClosedError(f"{self._name} {self._suspended}")
        if loop is None:
            raise EngineClosedError(f"{self._name} was closed; make a new one")
        if self._pid not in (None, os.getpid()):
            advice = "" if self._is_bound else "fork before the first request, or "
            raise EngineClosedError(
                f"{self._name} runs in process {self._pid}, of which this process is a fork: "
                f"{advice}make the LLM in the child process"
            )
        return loop

    def start(self) -> EngineLoop:
        """Return the loop, from here on bound to this process."""
        loop = self.check()
        self._pid = os.getpid()
        return loop

    def suspend(self, why: str) -> None:
        """Close the engine, which :meth:`resume` is to replace; `why` is what callers are told."""
        loop, self._loop = self.check(), None
        self._suspended = why
        loop.close()

    def resume(self, loop: EngineLoop) -> None:
        """Go on with another engine."""
        if not self._suspended:  # closed in between
            loop.close()
            self.check()
        self._loop, self._suspended = loop, ""

    def close(self) -> None:
        """Close the engine and let go of it. Idempotent."""
        self._suspended = ""
        loop, self._loop = self._loop, None
        # In a fork of the process that runs the engine there is no thread to stop, and its locks
        # may have been held at the moment of the fork.
        if loop is not None and self._pid in (None, os.getpid()):
            loop.close()
