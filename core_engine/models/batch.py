"""Batch: what a decoder needs of a step."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Batch(Protocol):
    """What a decoder needs of a step: an engine's ``ForwardBatch`` has it.

    Attributes
    ----------
    input_ids, positions, slot_mapping : Tensor[num_tokens], int64
        Tokens, their places in their sequences, and where keys and values go.
    query_start_loc : Tensor[num_seqs + 1], int32, on the CPU
        Where each sequence's tokens begin.
    seq_lens : Tensor[num_seqs], int32, on the CPU
        Tokens of each sequence once the step has run.
    block_tables : Tensor[num_seqs, max_blocks], int32
        The KV blocks of each sequence.
    attention : object or None
        What ``kernels.plan_attention`` returned for this step; None until it is needed.
    adapter_slots : Tensor[num_tokens], int32, on the CPU, or None
        The slot of each token's adapter, -1 for none; None: no token has one.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    attention: Any
    adapter_slots: torch.Tensor | None
