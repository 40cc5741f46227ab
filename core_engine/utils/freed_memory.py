"""Memory that was freed, and that the C library keeps for itself."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Have the C library give back to the system what was freed, where it can be told to (glibc).

    It keeps freed blocks of up to 32 MiB once it has seen such, between others that are in use.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
