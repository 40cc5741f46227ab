"""Integers on their way to a device, which nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def on_host(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return numbers as int32 on the host, where a device reads them without being waited for."""
    tensor = torch.from_numpy(numbers.astype(np.int32))
    return tensor if device.type == "cpu" else tensor.pin_memory()


def on_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return numbers as int32 on a device."""
    return on_host(numbers, device).to(device, non_blocking=True)
