"""build: from a configuration to an engine, or to several copies of one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from quire.assembly import build_engine
from quire.engine.engine import Engine
from quire.errors import NotSupportedError
from quire.replicas.copies import Copies
from quire.replicas.replicated_engine import ReplicatedEngine
from quire.utils import log
from quire.utils.device import choose_device
from quire.utils.threads import StepThreads, apply_thread_count

if TYPE_CHECKING:
    from quire.config import EngineConfig

logger = log.get_logger()


def build(config: EngineConfig) -> Engine | ReplicatedEngine:
    """Build an engine, or with ``data_parallel_size`` as many.

    Raises
    ------
    QuireError
        What :func:`quire.assembly.build_engine` raises, also in another process.
    """
    count = config.parallel.data_parallel_size
    if count == 1 or config.parallel.data_parallel_backend != "mp":
        return build_engine(config)  # which refuses what it cannot make
    if config.parallel.backend in ("ray", "external_launcher"):
        raise NotSupportedError(
            f"data_parallel_size={count} with distributed_executor_backend="
            f"{config.parallel.backend!r} is not offered by this version of quire: use 'mp', whose "
            "processes are all of this machine"
        )
    import torch

    log.configure()
    device = choose_device(config.device)
    threads_before = apply_thread_count()
    num_threads = max(1, threads_before // count)
    copies = Copies(config, device, num_threads)
    own = None
    try:
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        parallel = dataclasses.replace(config.parallel, data_parallel_size=1)
        own = build_engine(dataclasses.replace(config, parallel=parallel), copies)
        copies.wait_until_ready()
    except BaseException:
        copies.close(at_once=True)
        if own is not None:
            own.close()
        raise
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads_before)
    logger.info("%d replicas of it divide the requests among them", count)
    threads = StepThreads(num_threads if device.type == "cpu" else None)
    return ReplicatedEngine(config, own, copies, threads)
