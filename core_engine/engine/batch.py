"""ForwardBatch: the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class ForwardBatch:
    """One step's work, flat: the tokens of all scheduled sequences laid end to end.

    Attributes
    ----------
    input_ids : Tensor[num_tokens], int64
    positions : Tensor[num_tokens], int64
        Each token's place in its own sequence. ``[3, num_tokens]`` for multimodal rotary.
    query_start_loc : Tensor[num_seqs + 1], int32, on the CPU
        Sequence ``i`` owns the tokens ``query_start_loc[i]:query_start_loc[i + 1]``.
    seq_lens : Tensor[num_seqs], int32, on the CPU
        Tokens of each sequence in the KV cache once this step has run.
    block_tables : Tensor[num_seqs, max_blocks], int32
        The KV blocks of each sequence in order; 0, the null block, past the end.
    slot_mapping : Tensor[num_tokens], int64
        Where each token's key and value go: ``block * block_size + offset``.
    logits_indices : Tensor[num_logits], int64
        The tokens after which logits are wanted.
    adapter_slots : Tensor[num_tokens], int32, on the CPU, or None
        Which of the model's adapters each token is computed with, -1 for none; None: no token
        with any.
    attention : object
        What the attention backend prepared for this step, shared by all layers.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    logits_indices: torch.Tensor
    adapter_slots: torch.Tensor | None = None
    attention: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        """Sequences with at least one token in this step."""
        return self.seq_lens.shape[0]
