"""Transfers: small arrays to a device and back, of which nobody waits for the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNED = 16
"""Bytes at whose multiples an array begins within a transfer."""


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Bring arrays to a device, all in one transfer, without waiting for it.

    Parameters
    ----------
    arrays : sequence of ndarray
        On a CPU, what is returned shares their memory.
    device : torch.device

    Returns
    -------
    list of Tensor
        Of the arrays' shapes and types.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # From memory that is not pinned, a transfer is waited for. That of torch's own allocator is
    # not given away before the transfers from it have ended.
    packed = torch.empty(_starts(arrays)[-1], dtype=torch.uint8, pin_memory=True)
    pack(arrays, packed)
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[npt.NDArray[Any]], packed: torch.Tensor) -> None:
    """Write arrays one behind the other into bytes."""
    room = packed.numpy()
    for start, array in zip(_starts(arrays), arrays, strict=False):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        room[start : start + array.nbytes] = flat


def unpack(packed: torch.Tensor, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
    """Return what `pack` has written, of the arrays' shapes and types, wherever the bytes are."""
    found = []
    for start, array in zip(_starts(arrays), arrays, strict=False):
        part = packed[start : start + array.nbytes]
        found.append(part.view(torch.from_numpy(array).dtype).view(array.shape))
    return found


def _starts(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    """Return where each array begins, and where the last one ends."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // _ALIGNED) * _ALIGNED)
    return starts


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


class Download:
    """Tensors on their way to the host, copied beside what the device goes on to compute.

    Parameters
    ----------
    tensors : sequence of Tensor
        All of one device; on a CPU they are handed back as they are. What has been launched to
        compute them need not have ended.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._event: Any = None
        self._found = list(tensors)
        if not tensors or tensors[0].device.type == "cpu":
            return
        device = tensors[0].device
        module = torch.get_device_module(device)
        side = _side_stream(device)
        side.wait_stream(module.current_stream(device))
        with module.stream(side):
            self._found = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            ]
            self._event = module.Event()
            self._event.record(side)
        for tensor in tensors:
            tensor.record_stream(side)

    def wait(self) -> list[torch.Tensor]:
        """Return the tensors in the host's memory once they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._found
