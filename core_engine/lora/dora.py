"""DoRA: the factor of each output (Liu et al., arXiv:2402.09353)."""

from __future__ import annotations

import torch

_ROWS = 4096


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
    norms = [
        torch.linalg.vector_norm(
            torch.addmm(
                weight[first : first + _ROWS].float(), b[first : first + _ROWS], a, alpha=scale
            ),
            dim=1,
        )
        for first in range(0, len(weight), _ROWS)
    ]
    return magnitude / torch.cat(norms)
