"""What an engine does by default depends on what runs its model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.runner import Runner

logger = logging.getLogger("quire")

_SWAP_GIB = 4.0
"""Host memory for preempted requests, where the model is on an accelerator."""


def overlaps_steps(asked: bool | None, runner: Runner) -> bool:
    """Return whether steps are to overlap, by ``async_scheduling``.

    On a CPU nothing is gained: the model computes with the cores that would do the rest.
    """
    if not runner.can_go_ahead:
        if asked:
            logger.warning("async_scheduling=True has no effect on a model on several ranks")
        return False
    return runner.device.type != "cpu" if asked is None else asked


def bytes_to_swap(asked: float | None, runner: Runner) -> float:
    """Return how much host memory preempted requests may take, by ``swap_space``."""
    if not runner.can_go_ahead:
        if asked:
            logger.info(
                "swap_space=%g has no effect on a model on several ranks: what preempted requests "
                "had computed is computed anew",
                asked,
            )
        return 0
    if asked is None:
        asked = 0 if runner.device.type == "cpu" else _SWAP_GIB
    return asked * 2**30
