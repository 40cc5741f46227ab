"""AttentionNeeds: what a model and its KV cache ask of attention, by which a choice is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class LayerNeeds:
    """What a layer asks for.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim : int
    sliding_window : int or None
    softcap : float or None
    has_alibi : bool
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    softcap: float | None = None
    has_alibi: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """What all layers ask for.

    Attributes
    ----------
    dtype, cache_dtype : torch.dtype
        What is computed in, and what keys and values are kept in.
    block_size : int
        Tokens per KV block.
    layers : frozenset of LayerNeeds
    """

    dtype: torch.dtype
    cache_dtype: torch.dtype
    block_size: int
    layers: frozenset[LayerNeeds]


class Attention(Protocol):
    """A way to compute attention.

    Attributes
    ----------
    name : str
        By which it is asked for.
    """

    name: str

    def why_missing(self, device: torch.device) -> str | None:
        """Return why it cannot be had on a device here; None if it can."""

    def why_unfit(self, needs: AttentionNeeds) -> str | None:
        """Return what it cannot do of what is needed, and what would be right; None: nothing."""

    def operations(self, device: torch.device) -> Mapping[str, Callable[..., Any]]:
        """Return the operations that stand in for a backend's own, by name.

        ``plan_attention`` and ``paged_attention``, and perhaps those by which a step is recorded.
        """
