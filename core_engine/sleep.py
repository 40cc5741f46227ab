"""Sleep: an engine that lets its memory go for a while, and comes back as it was."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

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
    """

    def __init__(self, config: EngineConfig, lifetime: Lifetime) -> None:
        self._config = config
        self._lifetime = lifetime
        self._level = 0
        self._adapters: list[LoRARequest] = []
        self._lock = threading.Lock()

    @property
    def level(self) -> int:
        """0: it is awake."""
        return self._level

    def begin(self, level: int) -> None:
        """Let memory go; see :meth:`quire.LLM.sleep`."""
        if level not in (1, 2) or isinstance(level, bool):
            raise refuse("level", level, "1 (the KV cache goes) or 2 (the weights, too)")
        with self._lock:
            if self._level >= level:
                return
            if self._level:
                self._wake()
            loop = self._lifetime.start()
            loop.abort_all()
            if level == 1 and (engine := self._alone()) is not None:
                loop.call(lambda _: engine.sleep())
            else:
                self._adapters = loop.engine.adapters.list()
                self._lifetime.suspend(ASLEEP)
            self._level = level

    def end(self) -> bool:
        """Bring all back; return whether the engine is another one than before."""
        with self._lock:
            return self._wake() if self._level else False

    def _wake(self) -> bool:
        if self._lifetime.is_suspended:
            loop = make_loop(self._config)
            try:
                adapters, self._adapters = self._adapters, []
                for each in adapters:
                    if each.lora_path:
                        loop.engine.adapters.load(
                            each.lora_path, each.lora_name, base_model_name=each.base_model_name
                        )
            except BaseException:
                loop.close()
                raise
            self._lifetime.resume(loop)
            self._level = 0
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
