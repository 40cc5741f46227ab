"""Log-probabilities of generated and of prompt tokens, as their requests are told them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from quire.errors import QuireError
from quire.outputs import Logprob, TokenLogprobs
from quire.sampling.sampler import LogprobsTensors, Sampler

if TYPE_CHECKING:
    from quire.engine.live_request import LiveRequest
    from quire.engine.sequence import Sequence
    from quire.tokenizer.tokenizer import Tokenizer

# Rows of logits that are turned into prompt logprobs at once: a long prompt times a large
# vocabulary would otherwise take gigabytes.
_PROMPT_ROWS = 64


LogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From hidden states and the places of some among them to their logits."""


class TokenLogprobsMaker:
    """Makes entries of tensors, with the tokens' texts.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None leaves the texts out.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str | None:
        """Return a token's text by itself."""
        return None if self._tokenizer is None else self._tokenizer.decode_token(token_id)

    def entries(self, logprobs: LogprobsTensors, i: int, k: int) -> TokenLogprobs:
        """Return row ``i``: its own token, and the ``k`` likeliest (-1: all there are)."""
        width = logprobs.token_ids.shape[1] if k < 0 else min(k + 1, logprobs.token_ids.shape[1])
        ids = logprobs.token_ids[i, :width].tolist()
        values = logprobs.logprobs[i, :width].tolist()
        ranks = [int(logprobs.ranks[i]), *range(1, width)]
        found: TokenLogprobs = {}
        for token_id, value, rank in zip(ids, values, ranks, strict=True):
            if token_id not in found:
                found[token_id] = Logprob(value, rank, self.text(token_id))
        return found

    def extend_prompt(
        self,
        live: LiveRequest,
        sequence: Sequence,
        hidden: torch.Tensor,
        logits_of: LogitsOf,
        sampler: Sampler,
    ) -> None:
        """Add what a step tells of a prompt.

        Parameters
        ----------
        live : LiveRequest
            Of which ``prompt_logprobs`` grows.
        sequence : Sequence
            Before the step's tokens are counted as computed.
        hidden : Tensor[num_new_tokens, hidden_size]
            Of the sequence's tokens in the step.
        logits_of : LogitsOf
        sampler : Sampler
        """
        entries = live.prompt_logprobs
        assert entries is not None
        first = sequence.num_computed_tokens
        # Position p predicts prompt token p + 1; recomputation must not add it twice.
        todo = range(
            max(first, len(entries) - 1),
            min(first + len(hidden), sequence.num_prompt_tokens - 1),
        )
        k = live.request.params.prompt_logprobs or 0
        for low in range(todo.start, todo.stop, _PROMPT_ROWS):
            positions = range(low, min(low + _PROMPT_ROWS, todo.stop))
            indices = torch.tensor([p - first for p in positions], device=hidden.device)
            targets = torch.tensor(
                [sequence.prompt_token_ids[p + 1] for p in positions], device=hidden.device
            )
            logits = logits_of(hidden, indices)
            tensors = sampler.logprobs_for(logits, targets, k)
            if tensors.logprobs[:, 0].isnan().any():
                raise QuireError("the model produced NaN logits")
            entries.extend(self.entries(tensors, i, k) for i in range(len(positions)))
        if len(entries) == sequence.num_prompt_tokens:
            sequence.reads_prompt = sequence.skip_cached_prefix = False
