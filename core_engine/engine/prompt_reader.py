"""What a step tells of prompts: their log-probabilities, and the states of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from quire.engine.sequence import SequenceStatus

if TYPE_CHECKING:
    from quire.engine.live_request import LiveRequest
    from quire.engine.step_plan import StepPlan
    from quire.engine.token_logprobs import TokenLogprobsMaker
    from quire.sampling.sampler import Sampler

Logits = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From hidden states, the places of some among them, and their adapters' slots to their logits."""


def read_prompts(
    plan: StepPlan,
    hidden: torch.Tensor,
    requests: Mapping[str, LiveRequest],
    logprobs: TokenLogprobsMaker,
    sampler: Sampler,
    logits: Logits,
) -> dict[str, BaseException]:
    """Take what a step tells of prompts; return the requests for which that failed.

    Parameters
    ----------
    plan : StepPlan
        The step, its tokens not yet counted as computed.
    hidden : Tensor[num_tokens, hidden_size]
    requests : mapping of str to LiveRequest
    logprobs : TokenLogprobsMaker
    sampler : Sampler
    logits : callable
    """
    failed: dict[str, BaseException] = {}
    start = 0
    for sequence, count in zip(plan.sequences, plan.num_new_tokens, strict=True):
        if sequence.reads_prompt and sequence.status is not SequenceStatus.FINISHED:
            live = requests[sequence.request_id]
            own = hidden[start : start + count]
            slot = sequence.adapter_slot

            def of_sequence(
                hidden: torch.Tensor, indices: torch.Tensor, slot: int = slot
            ) -> torch.Tensor:
                slots = None if slot < 0 else torch.full((len(indices),), slot, dtype=torch.int32)
                return logits(hidden, indices, slots)

            try:
                if live.pooler is not None:
                    live.pooler.add(own, sequence.num_computed_tokens)
                else:
                    logprobs.extend_prompt(live, sequence, own, of_sequence, sampler)
            except Exception as error:  # it concerns this request alone
                failed[sequence.request_id] = error
        start += count
    return failed
