"""Matrix product with a weight ``[out_features, in_features]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.linear`."""
    return F.linear(x, weight, bias)
