"""Normalisation over the last axis, accumulated in float32."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.rms_norm`."""
    if weight is not None and (weight_offset or weight.dtype is not x.dtype):
        # In the weight's own type, weight + offset would lose the weight's last digits.
        weight = weight.float() + weight_offset
        return torch.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


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
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
