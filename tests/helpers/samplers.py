"""A sampler with short names: rows are added with one call, logits drawn from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quire.kernels import get_backend
from quire.sampling.sampler import Sampler, SamplerOutput
from quire.sampling_params import SamplingParams

VOCAB = 50
EOS = [0, 7]


def make(vocab_size: int = VOCAB, rows: int = 16) -> Sampler:
    device = torch.device("cpu")
    return Sampler(
        vocab_size=vocab_size, max_num_seqs=rows, device=device, kernels=get_backend(device)
    )


def add(
    sampler: Sampler,
    row: int,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    bad: list[list[int]] | None = None,
    seed: int = 0,
    **fields: Any,
) -> list[int]:
    """Give a row to a sequence and return its live list of generated tokens."""
    output = [] if output is None else output
    sampler.add(
        row,
        SamplingParams(**fields),
        seed=seed,
        prompt_token_ids=prompt or [1],
        output_token_ids=output,
        eos_token_ids=EOS,
        bad_words_ids=bad or [],
    )
    return output


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def seen_logits(logits: torch.Tensor, **fields: Any) -> torch.Tensor:
    """Return the logits of one row as a last processor sees them: after masks and biases."""
    seen: list[torch.Tensor] = []

    def spy(token_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append(row.clone())
        return row

    sampler = make()
    add(sampler, 0, logits_processors=[spy], **fields)
    sampler.sample(logits, np.array([0]))
    return seen[0]


def edited_logits(logits: torch.Tensor, **fields: Any) -> torch.Tensor:
    """Return the log-probabilities a beam search is given for one row, by token id."""
    sampler = make()
    add(sampler, 0, use_beam_search=True, n=VOCAB // 2, **fields)
    found = sampler.sample(logits, np.array([0])).logprobs
    assert found is not None
    result = torch.empty(VOCAB)
    result[found.token_ids[0, 1:]] = found.logprobs[0, 1:]
    return result


def assert_same(one: SamplerOutput, other: SamplerOutput, places: list[int]) -> None:
    assert one.token_ids[places].tolist() == other.token_ids[places].tolist()
    if one.logprobs is not None:
        assert other.logprobs is not None
        assert torch.equal(one.logprobs.token_ids[places], other.logprobs.token_ids[places])
        assert torch.equal(one.logprobs.logprobs[places], other.logprobs.logprobs[places])
        assert torch.equal(one.logprobs.ranks[places], other.logprobs.ranks[places])


def keep(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits
