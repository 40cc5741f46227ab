"""The kernel backends that work on this machine's CPU."""

from __future__ import annotations

from quire.kernels import available_backends

OF_OTHER_DEVICES = ("triton",)
"""Those that are there for a GPU alone, and tested where there is one."""


def cpu_backends() -> list[str]:
    """Return the names of all others that are installed."""
    return [name for name in available_backends() if name not in OF_OTHER_DEVICES]
