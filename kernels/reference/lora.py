"""LoRA: low-rank updates, adapter by adapter, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quire.kernels.lora import Expand, LoraRows, Shrink


def lora_shrink(x: torch.Tensor, adapters: Sequence[Shrink | None], rows: LoraRows) -> torch.Tensor:
    """See `quire.kernels.lora_interface.LoraOperations.lora_shrink`."""
    parts = [(adapters[place], where) for place, where in rows.groups]
    max_rank = max((len(part.scales) for part, _ in parts if part is not None), default=0)
    shrunk = torch.zeros(x.shape[0], max_rank, dtype=torch.float32, device=x.device)
    for part, where in parts:
        if part is not None and len(part.scales):
            product = F.linear(x[where].float(), part.a.float())
            shrunk[where, : len(part.scales)] = product.mul_(part.scales)
    return shrunk


def lora_expand(
    y: torch.Tensor,
    shrunk: torch.Tensor,
    adapters: Sequence[Expand | None],
    rows: LoraRows,
) -> None:
    """See `quire.kernels.lora_interface.LoraOperations.lora_expand`."""
    for place, where in rows.groups:
        part = adapters[place]
        if part is None:
            continue
        whole = None
        if part.factor is not None or part.offset is not None:
            whole = y[where].float()
        for each in part.slices:
            num_outputs, rank = each.b.shape
            columns = slice(each.first_row, each.first_row + num_outputs)
            ranks = slice(each.first_rank, each.first_rank + rank)
            gain = F.linear(shrunk[where, ranks], each.b.float())
            if whole is None:
                y[where, columns] = gain.add_(y[where, columns]).to(y.dtype)
            else:
                whole[:, columns] += gain
        if whole is not None:
            if part.factor is not None:
                whole *= part.factor
            if part.offset is not None:
                whole += part.offset
            y[where] = whole.to(y.dtype)
