"""activation and act_and_mul on a GPU."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation import activation as activation_by_torch
from quire.kernels.triton.activation_kernel import activate
from quire.kernels.triton.configs import config_for

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh")


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.activation`."""
    return _activate(x, kind, x.shape[-1], is_gated=False)


def act_and_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.act_and_mul`."""
    return _activate(x, kind, x.shape[-1] // 2, is_gated=True)


def _activate(x: torch.Tensor, kind: str, size: int, *, is_gated: bool) -> torch.Tensor:
    if kind not in KINDS:
        return activation_by_torch(x, kind)  # which says what is wrong
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.reshape(-1, x.shape[-1]).contiguous() if x.dim() != 2 else x.contiguous()
    out = torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = config_for("activation", x.device, size=size, dtype=str(x.dtype)[6:])
    activate[(x.shape[0], -(-size // config["BLOCK"]))](
        x, out, size, x.stride(0), KIND=kind, IS_GATED=is_gated, **config
    )
    return out
