"""Attention by the kernels that are here: Triton's, and the reference's by torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quire.kernels.attention.needs import AttentionNeeds
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton import backend as triton

_OF_ATTENTION = (
    "allocate_kv_cache",
    "write_kv",
    "plan_attention",
    "paged_attention",
    "make_decode_plan",
    "fill_decode_plan",
)


class TritonAttention:
    """What `TritonBackend` has."""

    name = "TRITON"

    @staticmethod
    def why_missing(device: torch.device) -> str | None:
        """See `Attention.why_missing`."""
        if triton.TritonBackend.supports(device):
            return None
        return triton.why_missing() or f"it is for GPUs, and not for {device.type!r}"

    @staticmethod
    def why_unfit(needs: AttentionNeeds) -> str | None:
        """See `Attention.why_unfit`."""
        return None

    @staticmethod
    def operations(device: torch.device) -> Mapping[str, Callable[..., Any]]:
        """See `Attention.operations`."""
        backend = triton.TritonBackend()
        return {name: getattr(backend, name) for name in _OF_ATTENTION if hasattr(backend, name)}


class TorchAttention:
    """What the reference has: torch's ``scaled_dot_product_attention`` over gathered keys."""

    name = "SDPA"

    @staticmethod
    def why_missing(device: torch.device) -> str | None:
        """See `Attention.why_missing`."""
        return None

    @staticmethod
    def why_unfit(needs: AttentionNeeds) -> str | None:
        """See `Attention.why_unfit`."""
        return None

    @staticmethod
    def operations(device: torch.device) -> Mapping[str, Callable[..., Any]]:
        """See `Attention.operations`."""
        backend = ReferenceBackend
        names = [name for name in _OF_ATTENTION if name not in ("allocate_kv_cache", "write_kv")]
        return {name: getattr(backend, name) for name in names if hasattr(backend, name)}
