"""Activation-aware scales: AWQ (Lin et al., arXiv:2306.00978).

Columns whose inputs are large are scaled up before they are rounded, and their inputs scaled down:
the rounding error is spread so that the output's error is smallest on inputs that were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from quire.kernels.reference.quantized import dequantize
from quire.quantization.rounding import Grid, round_int4

_NUM_ALPHAS = 20
_MOST_TOKENS = 512
"""Inputs that errors are measured on: enough that a choice holds for others."""

_SMALLEST = 1e-4


class Found(NamedTuple):
    """What a search found for one projection.

    Attributes
    ----------
    factors : Tensor[in_features], float32, or None
        What inputs are to be multiplied with, see `QuantizedWeight.input_factors`. None: nothing
        is gained.
    importance : Tensor[in_features], float32, or None
        The mean square of each input, as it is without factors, where ranges are to be chosen by
        it; None: nothing is gained.
    """

    factors: torch.Tensor | None = None
    importance: torch.Tensor | None = None


def search(
    weights: Sequence[torch.Tensor],
    inputs: torch.Tensor,
    grid: Grid,
    num_alphas: int = _NUM_ALPHAS,
) -> Found:
    """Find the factors under which a projection's outputs change least.

    Candidates are ``mean(abs(x)) ** -alpha`` for alphas from 0 to 1; 0 is none at all.

    Parameters
    ----------
    weights : sequence of Tensor[out_features, in_features]
        The parts of one projection, which share their inputs.
    inputs : Tensor[num_tokens, in_features], float32
        Without any token, nothing is found.
    grid
        What the weights will be rounded to.
    num_alphas
        Candidates; 1: no factors, and only whether ranges are chosen by importance is found out.
    """
    if not len(inputs):  # an expert that no token chose
        return Found()
    importance = inputs.square().mean(0)
    sizes = inputs.abs().mean(0)
    seen = inputs[:: max(1, len(inputs) // _MOST_TOKENS)][:_MOST_TOKENS]
    plain = [each.float() for each in weights]
    wanted = [seen @ each.T for each in plain]

    def error(found: Found, grid: Grid) -> float:
        total = 0.0
        for weight, target in zip(plain, wanted, strict=True):
            rounded = dequantize(round_int4(weight, grid, found.factors, found.importance))
            total += (seen @ rounded.T).sub_(target).square_().sum().item()
        return total

    # Ranges are searched in the end alone: what is gained by that differs little between alphas.
    quick = replace(grid, clip=False)
    alphas = [number / num_alphas for number in range(num_alphas)]
    candidates = [Found(_factors(sizes, alpha) if alpha else None) for alpha in alphas]
    best = min(candidates, key=lambda found: error(found, quick))
    finalists = [Found()] if best.factors is None else [Found(), best]
    if grid.clip:
        finalists += [each._replace(importance=importance) for each in finalists]
    return min(finalists, key=lambda found: error(found, grid))


def _factors(sizes: torch.Tensor, alpha: float) -> torch.Tensor:
    scaled = sizes.clamp(min=_SMALLEST).pow(alpha)
    # Around 1, so that scales stay where few bits hold them.
    scaled /= (scaled.max() * scaled.min()).sqrt()
    return scaled.reciprocal()
