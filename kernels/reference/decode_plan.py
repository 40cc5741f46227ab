"""DecodePlan: a plan that is filled again and again, for one token of each sequence."""

from __future__ import annotations

import numpy as np
import torch

from quire.kernels.reference.attention_plan import AttentionPlan


class DecodePlan:
    """The plan of the sequences that are not empty, and which these are.

    Attributes
    ----------
    plan : AttentionPlan or None
        None where all are empty.
    tokens : Tensor[num_kept], int64
        Their tokens.
    """

    __slots__ = ("block_size", "device", "num_seqs", "plan", "tokens")

    def __init__(self, num_seqs: int, block_size: int, device: torch.device) -> None:
        self.num_seqs = num_seqs
        self.block_size = block_size
        self.device = device
        self.plan: AttentionPlan | None = None
        self.tokens = torch.empty(0, dtype=torch.int64, device=device)


def make_decode_plan(
    num_seqs: int, max_blocks: int, block_size: int, device: torch.device
) -> DecodePlan:
    """See `quire.kernels.interface.Backend.make_decode_plan`."""
    del max_blocks
    return DecodePlan(num_seqs, block_size, device)


def fill_decode_plan(plan: DecodePlan, seq_lens: torch.Tensor, block_tables: torch.Tensor) -> None:
    """See `quire.kernels.interface.Backend.fill_decode_plan`."""
    lens = seq_lens.numpy().astype(np.int64)
    kept = np.flatnonzero(lens)
    plan.plan = None
    plan.tokens = torch.from_numpy(kept).to(plan.device)
    if len(kept):
        plan.plan = AttentionPlan(
            np.arange(len(kept)),
            np.ones(len(kept), dtype=np.int64),
            lens[kept],
            block_tables.cpu().numpy()[kept],
            plan.block_size,
            plan.device,
        )
