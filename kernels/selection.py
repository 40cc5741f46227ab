"""The choice of a backend, once per device."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import torch

from quire.kernels.cpu.backend import CpuBackend, why_missing
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton import backend as triton

if TYPE_CHECKING:
    from quire.kernels.interface import Backend

_BUILT_IN = {"reference": ReferenceBackend, "cpu": CpuBackend, "triton": triton.TritonBackend}
_WHY_MISSING = {"cpu": why_missing, "triton": triton.why_missing}

ENTRY_POINT_GROUP = "quire.kernels"


class KernelError(RuntimeError):
    """A backend that does not exist, cannot be loaded, or does not know the device."""


def available_backends() -> list[str]:
    """Names that `get_backend` accepts: the built-in ones, then those of installed packages."""
    built_in = [
        name for name in _BUILT_IN if name not in _WHY_MISSING or _WHY_MISSING[name]() is None
    ]
    return [*built_in, *sorted(name for name in _installed() if name not in _BUILT_IN)]


def get_backend(device: torch.device | str | None = None, name: str | None = None) -> Backend:
    """Return the backend that works on `device`, always the same object for the same arguments.

    Parameters
    ----------
    device
        Where the tensors live; None is the CPU.
    name
        A backend by name. None: the one that QUIRE_KERNELS names, else the one of the highest
        priority that supports the device.

    Raises
    ------
    KernelError
        `name` is not available, could not be loaded, or does not support `device`.
    """
    return _choose(torch.device(device or "cpu"), name or os.environ.get("QUIRE_KERNELS") or None)


@cache
def _choose(device: torch.device, name: str | None) -> Backend:
    if name is not None:
        backend = _load(name)
        if not backend.supports(device):
            raise KernelError(
                f"kernel backend {name!r} does not support device {str(device)!r}; "
                f"available: {', '.join(available_backends())}"
            )
        return backend
    candidates = [_load(each) for each in available_backends()]
    return max(
        (each for each in candidates if each.supports(device)), key=lambda each: each.priority
    )


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


@cache
def _load(name: str) -> Backend:
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    point = _installed().get(name)
    if point is None:
        raise KernelError(
            f"kernel backend {name!r} is unknown; available: {', '.join(available_backends())}"
        )
    try:
        loaded = point.load()
        backend: Backend = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        raise KernelError(
            f"kernel backend {name!r} ({point.value}) could not be loaded: {error}"
        ) from error
    return backend
