"""ExpertOperations: the part of a backend that computes with mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Expert = Callable[[torch.Tensor], torch.Tensor]
"""``rows[num_rows, hidden_size] -> [num_rows, hidden_size]``, each row by itself."""


class ExpertOperations(Protocol):
    """Layers whose tokens are each computed by a few of many experts.

    Sparsely gated mixtures (Shazeer et al., arXiv:1701.06538). The rules of
    `quire.kernels.interface` hold here as well.
    """

    def route(
        self, logits: torch.Tensor, per_token: int, *, normalized: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token, and what each of them counts.

        The softmax of the logits, in float32, says what an expert counts; the highest are chosen,
        among equal ones, on a CPU, those that `torch.topk` chooses.

        Parameters
        ----------
        logits : Tensor[num_tokens, num_experts]
        per_token : int
            From 1 to ``num_experts``.
        normalized : bool
            Whether a token's weights are divided by their sum.

        Returns
        -------
        weights : Tensor[num_tokens, per_token], float32
            In descending order.
        chosen : Tensor[num_tokens, per_token], int64
            Experts, each at most once for a token.
        """

    def mix_experts(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        experts: Sequence[Expert | None],
    ) -> torch.Tensor:
        """Compute each token's weighted sum of what its experts make of it.

        Each expert that any token has chosen is called once, with all rows that did, in the
        order of the tokens; the others are not called. Contributions to a row are weighted and
        added in float32, in ascending order of the experts' numbers: where experts compute a row
        to the same bits in any company, so does this.

        Parameters
        ----------
        x : Tensor[num_tokens, hidden_size]
        weights : Tensor[num_tokens, per_token], float32
        chosen : Tensor[num_tokens, per_token], int64
            From `route`. How many rows an expert has is waited for on the CPU.
        experts : sequence of functions
            By number. None in place of one adds nothing: another rank has it.

        Returns
        -------
        Tensor[num_tokens, hidden_size]
        """

    def mix_stacked_experts(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        kind: str,
        *,
        first_expert: int = 0,
    ) -> torch.Tensor:
        """Do as `mix_experts` with gated experts whose weights are plain, and stand together.

        An expert computes ``act_and_mul(rows @ gate_up[i].T, kind) @ down[i].T``. What is between
        its products is rounded to the type of `x` once at least, and so is what it makes. A
        backend with a true attribute ``mixes_without_waiting`` does not wait for the device here,
        nor in `route`: all shapes are known on the CPU, and a graph can capture it.

        Parameters
        ----------
        x : Tensor[num_tokens, hidden_size]
        weights : Tensor[num_tokens, per_token], float32
        chosen : Tensor[num_tokens, per_token], int64
            From `route`.
        gate_up : Tensor[num_held, 2 * inner_size, hidden_size]
            Of the experts that are here, by number; of the type of `x`.
        down : Tensor[num_held, hidden_size, inner_size]
        kind : str
            As for `activation`.
        first_expert : int
            The number of the first that is here. Those before it, and those behind the last, add
            nothing.

        Returns
        -------
        Tensor[num_tokens, hidden_size]

        Raises
        ------
        ValueError
            `kind` is not known.
        """
