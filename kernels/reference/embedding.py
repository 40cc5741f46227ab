"""Table lookup of token (or position) embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.embedding`."""
    return F.embedding(ids, weight)
