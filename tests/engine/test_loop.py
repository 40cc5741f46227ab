"""EngineLoop: what may be called where its thread does not run."""

from __future__ import annotations

import os
import threading

from quire.engine.loop import EngineLoop


class NoEngine:
    """An engine that never has anything to do."""

    has_work = False

    def step(self):
        return []

    def close(self):
        pass


def test_adapters_that_go_in_a_fork_wait_for_no_lock(monkeypatch):
    """A thread of the parent process may have held it, and there is none in the child to let go."""
    loop = EngineLoop(NoEngine())
    loop.call(lambda engine: None)
    with loop._wakeup, monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        released = threading.Thread(target=loop.release_adapters, daemon=True)
        released.start()
        released.join(10)
        assert not released.is_alive()
    loop.close()
