"""LogprobsTensors: log-probabilities of chosen and of likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class LogprobsTensors:
    """Log-probabilities under the model's own distribution, a row per position.

    Attributes
    ----------
    token_ids : Tensor[num_rows, k + 1], int64
        Column 0 is the token that was sampled, or that the prompt has; then the k likeliest,
        best first.
    logprobs : Tensor[num_rows, k + 1], float32
        Of the same tokens.
    ranks : Tensor[num_rows], int64
        Rank of column 0, from 1; the others' are 1 to k.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
