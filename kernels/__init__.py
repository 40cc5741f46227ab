"""The operations of a language model's forward pass, one function each, per device.

`get_backend` chooses, once per device, who carries them out: the ``reference`` backend in
plain torch, or one that an installed package offers under the entry-point group
``quire.kernels``. What each operation means stands in `quire.kernels.interface.Backend`.

Nothing is imported here before a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.kernels.interface import AttentionPlan, Backend
    from quire.kernels.selection import KernelError, available_backends, get_backend

__all__ = ["AttentionPlan", "Backend", "KernelError", "available_backends", "get_backend"]

_HOMES = {
    "AttentionPlan": "interface",
    "Backend": "interface",
    "KernelError": "selection",
    "available_backends": "selection",
    "get_backend": "selection",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quire.kernels.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
