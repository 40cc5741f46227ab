"""Sleep: an engine that lets its memory go for a while, and comes back as it was."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from quire.errors import EngineClosedError
from quire.lifetime import make_loop
from quire.utils.checks import refuse

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.engine import Engine
    from quire.lifetime import Lifetime
    from quire.lora_request import LoRARequest

ASLEEP = "sleeps: call wake_up() first"


class Sleep:
    """Whether an LLM's engine sleeps, and what it takes to wake it.

    Parameters
    ----------
    config : EngineConfig
    lifetime : Lifetime

    Attributes
    ----------
    lock : RLock
        Held while it falls asleep or wakes.
    """

    def __init__(self, config: EngineConfig, lifetime: Lifetime) -> None:
        self._config = config
        self._lifetime = lifetime
        self._level = 0
        self._adapters: list[LoRARequest] = []
        self.lock = threading.RLock()

    @property
    def level(self) -> int:
        """0: it is awake, or closed."""
        return 0 if self._lifetime.closed else self._level

    def begin(self, level: int) -> None:
        """Let memory go; see :meth:`quire.LLM.sleep`."""
        if level not in (1, 2) or isinstance(level, bool):
            raise refuse("level", level, "1 (the KV cache goes) or 2 (the weights, too)")
        with self.lock:
            if self.level >= level:
                return
            if self.level:
                self._wake()
            loop = self._lifetime.start()
            if level == 1 and (engine := self._alone()) is not None:

                def rest(_: object) -> None:
                    loop.abort_all(engine)  # in one call: no request comes in between
                    engine.sleep()

                loop.call(rest)
            else:
                with suppress(EngineClosedError):  # it broke down, and is to be another
                    loop.call(loop.abort_all)
                self._adapters = loop.engine.adapters.list()
                self._lifetime.suspend(ASLEEP)
            self._level = level

    def end(self) -> bool:
        """Bring all back; return whether the engine is another one than before."""
        with self.lock:
            return self._wake() if self._level else False

    def _wake(self) -> bool:
        if self._lifetime.is_suspended:
            loop = make_loop(self._config)
            try:
                for each in self._adapters:
                    if each.lora_path:
                        loop.engine.adapters.load(
                            each.lora_path, each.lora_name, base_model_name=each.base_model_name
                        )
            except BaseException:
                loop.close()
                raise
            self._lifetime.resume(loop)
            self._level, self._adapters = 0, []
            return True
        engine = self._alone()
        assert engine is not None
        self._lifetime.start().call(lambda _: engine.wake_up())
        self._level = 0
        return False

    def _alone(self) -> Engine | None:
        """Return the engine, where it is one, and all of it in this process."""
        from quire.engine.engine import Engine

        engine = self._lifetime.check().engine
        if isinstance(engine, Engine) and self._config.parallel.num_ranks == 1:
            return engine
        return None
