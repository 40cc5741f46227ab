"""Mixtures of experts: which are chosen, and the sum of what they make of each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from quire.kernels.experts_interface import Expert
from quire.kernels.reference.activation import act_and_mul
from quire.kernels.reference.linear import linear


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


def mix_stacked_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    *,
    first_expert: int = 0,
) -> torch.Tensor:
    """See `quire.kernels.experts_interface.ExpertOperations.mix_stacked_experts`.

    It waits for the device, as `mix_experts` does.
    """
    num_held = len(gate_up)
    numbers = chosen - first_expert
    numbers = numbers.where((numbers >= 0) & (numbers < num_held), num_held)
    experts = [partial(_expert, one, other, kind) for one, other in zip(gate_up, down, strict=True)]
    return mix_experts(x, weights, numbers, [*experts, None])


def _expert(
    gate_up: torch.Tensor, down: torch.Tensor, kind: str, rows: torch.Tensor
) -> torch.Tensor:
    return linear(act_and_mul(linear(rows, gate_up), kind), down)
