"""Memory on huge pages, for what is read from end to end in every step."""

from __future__ import annotations

import ctypes
import math
import sys

import torch

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU, on huge pages as far as they are whole.

    Where the system grants them (Linux, ``transparent_hugepage`` at ``madvise`` or ``always``) the
    processor looks up one address for 2 MiB and not one for every 4 KiB. What is less than a page
    at the end stays on small ones, so that nothing is taken that is not used. The storage behind
    the tensor is up to 2 MiB larger than it, of memory that is never touched.

    Parameters
    ----------
    shape : tuple of int
    dtype : torch.dtype

    Raises
    ------
    RuntimeError, MemoryError
        There is not enough memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device="cpu")
    raw = torch.empty(num_bytes + _HUGE, dtype=torch.uint8, device="cpu")
    start = -raw.data_ptr() % _HUGE
    tensor = raw[start : start + num_bytes]
    libc = ctypes.CDLL(None, use_errno=True)
    # Advice: where it is not taken, the memory is as good as any.
    libc.madvise(
        ctypes.c_void_p(tensor.data_ptr()),
        ctypes.c_size_t(num_bytes // _HUGE * _HUGE),
        _MADV_HUGEPAGE,
    )
    return tensor.view(dtype).view(shape)
