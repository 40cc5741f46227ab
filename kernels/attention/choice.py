"""The choice of who computes attention, and a backend that has it computed so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quire.kernels.attention.flash_attn import FlashAttention
from quire.kernels.attention.flashinfer import FlashInfer
from quire.kernels.attention.needs import Attention, AttentionNeeds
from quire.kernels.attention.own import TorchAttention, TritonAttention
from quire.kernels.reference.backend import ReferenceBackend

if TYPE_CHECKING:
    from quire.kernels.interface import Backend

_ALL: tuple[Attention, ...] = (TritonAttention(), TorchAttention(), FlashAttention(), FlashInfer())
ATTENTION = {each.name: each for each in _ALL}
"""Everyone who computes attention, by name."""

# What belongs together with attention: nobody else's can be used beside it.
_RECORDED = ("make_decode_plan", "fill_decode_plan")
# A model as one call has its attention within.
_HIDDEN = (*_RECORDED, "library")


def usable_attention(device: torch.device) -> list[str]:
    """Return the names of those that can be had on a device here."""
    return [name for name, each in ATTENTION.items() if each.why_missing(device) is None]


def why_not(name: str, device: torch.device, needs: AttentionNeeds) -> str | None:
    """Return why somebody cannot compute the attention of a model, and who can; None: nothing.

    Parameters
    ----------
    name : str
        Of `ATTENTION`.
    device : torch.device
    needs : AttentionNeeds
    """
    attention = ATTENTION[name]
    reason = attention.why_missing(device) or attention.why_unfit(needs)
    if reason is None:
        return None
    others = [
        other
        for other in usable_attention(device)
        if other != name and ATTENTION[other].why_unfit(needs) is None
    ]
    return f"{reason}. What can be used here: {', '.join(others)}"


def with_attention(kernels: Backend, name: str, device: torch.device) -> Backend:
    """Return a backend whose attention is computed by somebody else; always the same object.

    Parameters
    ----------
    kernels : Backend
        For everything else.
    name : str
        Of `ATTENTION`.
    device : torch.device
    """
    compose: Any = _compose  # a backend that is no class's object may still be hashed
    composed: Backend = compose(kernels, name, device)
    return composed


@cache
def _compose(kernels: Any, name: str, device: torch.device) -> Any:
    operations = ATTENTION[name].operations(device)
    own = (getattr(kernels, each, None) == what for each, what in operations.items())
    hidden = (each for each in _HIDDEN if each not in operations)
    if all(own) and not any(hasattr(kernels, each) for each in hidden):
        return kernels
    return WithAttention(kernels, name, operations)


def records_decode(kernels: Any) -> bool:
    """Whether steps of one token per sequence can be recorded with a backend's attention.

    The reference's plans are for that as well, but are read on the host.
    """
    make = getattr(kernels, "make_decode_plan", None)
    return callable(make) and make is not getattr(ReferenceBackend, "make_decode_plan", None)


class WithAttention:
    """A backend, but for its attention.

    Parameters
    ----------
    kernels : Backend
    attention : str
        Whose it is.
    operations : mapping of str to callable
    """

    def __init__(
        self, kernels: Backend, attention: str, operations: Mapping[str, Callable[..., Any]]
    ) -> None:
        self._kernels = kernels
        self.name = f"{kernels.name} with {attention}"
        self.attention = attention
        for each, operation in operations.items():
            # To be recorded, writing into the cache has to leave tokens out: whoever has such
            # plans of its own does so.
            if each in _RECORDED and "write_kv" not in operations and not records_decode(kernels):
                continue
            setattr(self, each, operation)

    def __getattr__(self, name: str) -> Any:
        if name in _HIDDEN or name == "_kernels":
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self._kernels, name)
