"""``start_profile`` and ``stop_profile``, by torch.profiler."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.integrations.vllm.exceptions import VLLMValidationError
from quire.utils.log import get_logger

if TYPE_CHECKING:
    import quire

logger = get_logger(__name__)

_FOLDER = "VLLM_TORCH_PROFILER_DIR"


def _started() -> Any:
    from torch.profiler import ProfilerActivity, profile

    from quire.utils.device import found_accelerator

    activities = [ProfilerActivity.CPU]
    kind = found_accelerator()
    if kind is not None and hasattr(ProfilerActivity, kind.upper()):
        activities.append(getattr(ProfilerActivity, kind.upper()))
    running = profile(activities=activities)
    running.start()
    return running


class Profiler:
    """Records what the engine's thread does, from a start to a stop.

    A trace is written in the format of Chrome's tracing, as ``<prefix>.<time>.pt.trace.json.gz``,
    to ``torch_profiler_dir`` of ``profiler_config``, else to what VLLM_TORCH_PROFILER_DIR names,
    else to ``./vllm_profile``. The native CPU kernels are one call to torch, and so one bar of it.

    Parameters
    ----------
    llm : quire.LLM
    config : mapping or object, optional
        ``profiler_config``.
    """

    def __init__(self, llm: quire.LLM, config: Any = None) -> None:
        said = config if isinstance(config, Mapping) or config is None else vars(config)
        folder = (said or {}).get("torch_profiler_dir") or os.environ.get(_FOLDER)
        self._folder = Path(folder or "vllm_profile")
        self._llm = llm
        self._running: Any = None
        self._prefix = "quire"

    def start(self, prefix: str | None = None) -> None:
        """Begin.

        Raises
        ------
        VLLMValidationError
            It has begun already.
        """
        if self._running is not None:
            raise VLLMValidationError(
                "start_profile: a profile is running; call stop_profile first"
            )
        # torch records the thread that starts it, and complains where its profiler is first used
        # on another thread than that which imported torch: mostly this one.
        _started().stop()
        self._running = self._llm._call(lambda engine: _started())
        self._prefix = prefix or "quire"

    def stop(self) -> None:
        """End, and write the trace.

        Raises
        ------
        VLLMValidationError
            None has begun.
        """
        running, self._running = self._running, None
        if running is None:
            raise VLLMValidationError(
                "stop_profile: no profile is running; call start_profile first"
            )
        self._llm._call(lambda engine: running.stop())
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._prefix}.{time.time_ns()}.pt.trace.json.gz"
        running.export_chrome_trace(str(path))
        logger.info("the profile is in %s", path)
