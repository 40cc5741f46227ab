"""Rounding that makes up for its errors: GPTQ (Frantar et al., arXiv:2210.17323).

Columns are rounded one after the other; what is lost in one is made good, as far as the inputs
that were seen allow, in those that are still to come.
"""

from __future__ import annotations

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import halves
from quire.quantization.rounding import Grid, Groups, fit_groups, panels

_DAMPING = 0.01
"""Of the mean of the Hessian's diagonal: added to it, so that it can be inverted."""

_MOST_DAMPING = 1000.0
_BLOCK = 128
_LARGEST_BLOCK = 256


def round_compensated(
    weight: torch.Tensor, inputs: torch.Tensor, grid: Grid, *, by_importance: bool = False
) -> QuantizedWeight:
    """Round a weight to 4 bits so that its outputs change little on some inputs.

    Parameters
    ----------
    weight : Tensor[out_features, in_features]
        Finite.
    inputs : Tensor[num_tokens, in_features], float32
    grid
        Its group size divides the columns, or is at least their number.
    by_importance
        Whether columns are taken in the order of their inputs' size, the largest first
        (``desc_act``), and grouped in it.

    Raises
    ------
    ModelLoadError
        A value of the weight is not finite; the message goes on after the weight's name.
    """
    num_columns = weight.shape[1]
    # A copy: it is changed column by column.
    rest = torch.cat([panel for _, panel in panels(weight)])
    hessian = inputs.T @ inputs
    order = None
    if by_importance:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        rest, hessian = rest[:, order], hessian[order][:, order]
    factor = _inverse_factor(hessian)
    group_size = min(grid.group_size, num_columns)
    # Where it can be, a block is a group: then a group's scale sees every correction before it.
    block = group_size if group_size <= _LARGEST_BLOCK else _BLOCK
    num_groups = num_columns // group_size
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = (torch.empty(weight.shape[0], num_groups) for _ in range(2))
    found: Groups | None = None
    for first in range(0, num_columns, block):
        end = min(first + block, num_columns)
        part = rest[:, first:end].clone()
        errors = torch.empty_like(part)
        for index in range(end - first):
            column = first + index
            if column % group_size == 0:
                columns = part if block == group_size else rest[:, column : column + group_size]
                found = fit_groups(columns[:, None], grid)
                scales[:, column // group_size] = found.scales[:, 0]
                zeros[:, column // group_size] = found.zeros[:, 0]
            assert found is not None
            scale, zero = found.scales[:, 0], found.zeros[:, 0]
            value = part[:, index]
            code = (value / scale).round_().add_(zero).clamp_(0, 15)
            codes[:, column] = code
            error = (value - (code - zero) * scale) / factor[column, column]
            part[:, index:] -= error[:, None] * factor[column, column:end]
            errors[:, index] = error
        rest[:, end:] -= errors @ factor[first:end, end:]
    if order is not None:
        codes, order = _sort_groups(codes, order, group_size)
    return QuantizedWeight(
        "int4",
        halves(codes),
        scales,
        num_columns,
        group_size,
        zeros=None if grid.symmetric else zeros.to(torch.int16),
        order=order,
    )


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular ``u`` of ``u.T @ u``, the inverse of the damped Hessian."""
    diagonal = hessian.diagonal()
    # Inputs that were always 0 say nothing: their columns are rounded as they are.
    diagonal[diagonal == 0] = 1
    damping = _DAMPING
    while True:
        damped = hessian + torch.diag(torch.full_like(diagonal, damping * diagonal.mean().item()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping *= 10
        if damping > _MOST_DAMPING:
            # Nothing can be made of these inputs: no column makes good for another.
            return torch.eye(len(diagonal))


def _sort_groups(
    codes: torch.Tensor, order: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the columns of each group into the order of their inputs, as formats have them."""
    within = order.view(-1, group_size).argsort(dim=1)
    within += torch.arange(0, len(order), group_size)[:, None]
    columns = within.flatten()
    return codes[:, columns], order[columns]
