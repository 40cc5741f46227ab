"""Normalisation over the last axis, accumulated in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (weight.float() + weight_offset)
    return normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset=weight_offset), total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.layer_norm`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
