"""Mixtures of experts: which are chosen, and the sum of what they make of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.kernels.experts_interface import Expert


def route(
    logits: torch.Tensor, per_token: int, *, normalized: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.experts_interface.ExpertOperations.route`."""
    shares = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(shares, per_token, dim=-1)
    if normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def mix_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    experts: Sequence[Expert | None],
) -> torch.Tensor:
    """See `quire.kernels.experts_interface.ExpertOperations.mix_experts`."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    rows = order // chosen.shape[1]
    shares = weights.flatten()[order, None]
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    first = 0
    for expert, count in zip(experts, counts, strict=True):
        if not count:
            continue
        end = first + count
        if expert is not None:
            mine = rows[first:end]
            # No row is there twice: nothing is added in an order that could be another.
            total[mine] += expert(x[mine]).float().mul_(shares[first:end])
        first = end
    return total.to(x.dtype)
