"""Activation functions, alone and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


_KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "tanh": torch.tanh,
}


def _function(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        return _KINDS[kind]
    except KeyError:
        raise ValueError(
            f"activation kind is {kind!r}; it must be one of {', '.join(_KINDS)}"
        ) from None


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.activation`."""
    return _function(kind)(x)


def act_and_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.act_and_mul`."""
    gate, up = x.chunk(2, -1)
    return _function(kind)(gate).mul_(up)
