"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.rotary_embedding`."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    half = cos.shape[-1]
    rotary_dim = 2 * half
    turned = x[..., :rotary_dim]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    new_first = (first * cos - second * sin).to(x.dtype)
    new_second = (second * cos + first * sin).to(x.dtype)
    if interleaved:
        rotated = torch.stack((new_first, new_second), -1).flatten(-2)
        return torch.cat((rotated, x[..., rotary_dim:]), -1)
    return torch.cat((new_first, new_second, x[..., rotary_dim:]), -1)
