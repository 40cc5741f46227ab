"""Mixtures of experts on a GPU: what is launched, of shapes that the host knows beforehand."""

from __future__ import annotations

import torch

from quire.kernels.reference.experts import mix_stacked_experts as mix_by_torch
from quire.kernels.reference.experts import route as route_by_torch
from quire.kernels.triton.configs import bucket, config_for
from quire.kernels.triton.experts_products import (
    KINDS,
    add_experts,
    count_pairs,
    expert_products,
    order_pairs,
    route_rows,
)
from quire.kernels.triton.lora import precision

_MOST_CHOICES = 32
"""Beyond so many experts per token, choosing one after the other takes too long."""

_PAIRS = 1024
_TOGETHER = 8
_BLOCK = 1024


def route(
    logits: torch.Tensor, per_token: int, *, normalized: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.experts_interface.ExpertOperations.route`.

    Among equal experts that of the lower number is chosen.
    """
    num_tokens, num_experts = logits.shape
    if not num_tokens or per_token > _MOST_CHOICES:
        return route_by_torch(logits, per_token, normalized=normalized)
    weights = torch.empty(num_tokens, per_token, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(num_tokens, per_token, dtype=torch.int64, device=logits.device)
    route_rows[(num_tokens,)](
        logits,
        weights,
        chosen,
        logits.stride(0),
        num_experts,
        PER_TOKEN=per_token,
        NORMALIZED=normalized,
        EXPERTS=bucket(num_experts),
        CHOICES=bucket(per_token),
        num_warps=1 if num_experts <= 256 else 4,
    )
    return weights, chosen


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

    A row has the same bits in any company that is computed in tiles of the same size.
    """
    if kind not in KINDS or x.dtype is not gate_up.dtype or x.dtype is not down.dtype:
        return mix_by_torch(x, weights, chosen, gate_up, down, kind, first_expert=first_expert)
    num_tokens, hidden_size = x.shape
    num_held, _, inner_size = down.shape
    per_token = chosen.shape[1]
    num_pairs = num_tokens * per_token
    if not num_pairs or not num_held:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    chosen, weights = chosen.contiguous(), weights.contiguous()
    config = config_for(
        "experts",
        x.device,
        rows=bucket(-(-num_pairs // num_held)),
        hidden=hidden_size,
        inner=inner_size,
        dtype=str(x.dtype).removeprefix("torch."),
    )
    rows = config["ROWS"]
    # A tile that is not full is the last of its expert.
    most_tiles = num_pairs // rows + min(num_held, num_pairs)
    # Each begins at a multiple of 16 bytes: kernels are compiled for that, once.
    sizes = [-(-size // 4) * 4 for size in (num_held, 1, num_pairs, 3 * most_tiles)]
    numbers = torch.empty(sum(sizes), dtype=torch.int32, device=x.device)
    counts, num_tiles, order, tiles = numbers.split_with_sizes(sizes)
    count_pairs[(num_held,)](chosen, counts, num_pairs, first_expert, PAIRS=_PAIRS, num_warps=4)
    order_pairs[(num_held,)](
        chosen,
        counts,
        order,
        tiles,
        num_tiles,
        num_pairs,
        first_expert,
        num_held,
        ROWS=rows,
        EXPERTS=bucket(num_held),
        PAIRS=_PAIRS,
        num_warps=4,
    )

    def multiply(
        inputs: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, kind: str | None
    ) -> torch.Tensor:
        outputs = config["UP_OUTPUTS" if kind else "DOWN_OUTPUTS"]
        expert_products[(most_tiles * -(-made.shape[1] // outputs),)](
            inputs,
            weight,
            order,
            tiles,
            num_tiles,
            made,
            most_tiles,
            num_pairs // len(inputs),
            made.shape[1],
            inputs.shape[1],
            inputs.stride(0),
            weight.stride(0),
            weight.stride(1),
            KIND=kind,
            PRECISION=precision(),
            ROWS=rows,
            OUTPUTS=outputs,
            INPUTS=config["INPUTS"],
            TOGETHER=_TOGETHER,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        return made

    inner = multiply(x, gate_up, x.new_empty(num_pairs, inner_size), kind)
    made = multiply(inner, down, x.new_empty(num_pairs, hidden_size), None)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(_BLOCK, bucket(hidden_size))
    add_experts[(num_tokens, -(-hidden_size // block))](
        made,
        weights,
        chosen,
        out,
        first_expert,
        num_held,
        hidden_size,
        PER_TOKEN=per_token,
        CHOICES=bucket(per_token),
        BLOCK=block,
        num_warps=4,
    )
    return out
