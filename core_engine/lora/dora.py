"""DoRA: the factor of each output (Liu et al., arXiv:2402.09353)."""

from __future__ import annotations

import torch

_NUMBERS = 1 << 17  # of the adapted weight at a time, few enough to stay in a cache


def factors(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """Return magnitude over norm, for each row of the adapted weight; computed in float32.

    Parameters
    ----------
    weight : Tensor[num_rows, in_features]
        The model's.
    a : Tensor[rank, in_features], float32
    b : Tensor[num_rows, rank], float32
    scale
        Factor on ``b @ a``.
    magnitude : Tensor[num_rows], float32

    Returns
    -------
    Tensor[num_rows]
        Not finite where the adapted weight is zero.
    """
    norms = torch.empty(len(weight))
    step = max(1, _NUMBERS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        adapted = torch.addmm(weight[rows].float(), b[rows], a, alpha=scale)
        torch.linalg.vector_norm(adapted, dim=1, out=norms[rows])
    return magnitude / norms
