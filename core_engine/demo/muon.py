"""Muon, an optimizer for the matrices of a network's hidden layers.

The method is that of K. Jordan and others, "Muon: An optimizer for hidden layers in neural
networks" (2024): a step's direction is the momentum with all its singular values brought near
one, by five Newton-Schulz iterations with the coefficients given there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of every matrix near one.

    Parameters
    ----------
    matrices : Tensor
        ``[num_matrices, rows, columns]``

    Returns
    -------
    Tensor
        Of the same shape.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Muon over matrices, those of one shape at once.

    Parameters
    ----------
    matrices : Iterable[torch.nn.Parameter]
        Two-dimensional parameters, embeddings excepted.
    momentum : float
    weight_decay : float
        Relative to the learning rate.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        groups: defaultdict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in groups.items()]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every matrix by one step, by the gradients that lie on them."""
        for group, average in self._groups:
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            average.lerp_(gradients, 1 - self._momentum)
            directions = orthogonalize(gradients.lerp(average, self._momentum))
            rows, columns = directions.shape[1:]
            scale = learning_rate * max(1.0, rows / columns) ** 0.5
            for matrix, direction in zip(group, directions, strict=True):
                matrix.mul_(1 - learning_rate * self._weight_decay)
                matrix.add_(direction, alpha=-scale)
