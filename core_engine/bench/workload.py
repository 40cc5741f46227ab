"""Workloads: which tokens go in, and how many come out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and the number of tokens to generate for each.

    Attributes
    ----------
    name : str
    prompts : list of list of int
    output_lens : list of int
        Exactly so many tokens are generated: end-of-text is ignored.
    """

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_output_tokens(self) -> int:
        """Tokens that are generated."""
        return sum(self.output_lens)

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens to compute where a beginning that prompts share is computed once."""
        total, before = 0, list[int]()
        for prompt in sorted(self.prompts):
            pairs = zip(before, prompt, strict=False)
            total += len(prompt) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            before = prompt
        return total


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(10, min(vocab_size, 100_000) - 10) for _ in range(count)]


def uniform(
    num_prompts: int, input_len: int, output_len: int, *, vocab_size: int, seed: int = 0
) -> Workload:
    """Prompts of one length."""
    rng = random.Random(seed)
    return Workload(
        f"{num_prompts} x ({input_len} in, {output_len} out)",
        [_tokens(rng, input_len, vocab_size) for _ in range(num_prompts)],
        [output_len] * num_prompts,
    )


def mixed(
    num_prompts: int,
    input_lens: tuple[int, int],
    output_lens: tuple[int, int],
    *,
    vocab_size: int,
    seed: int = 0,
) -> Workload:
    """Prompts and outputs of lengths drawn evenly from two ranges, ends included."""
    rng = random.Random(seed)
    prompts = [_tokens(rng, rng.randint(*input_lens), vocab_size) for _ in range(num_prompts)]
    outputs = [rng.randint(*output_lens) for _ in range(num_prompts)]
    name = (
        f"{num_prompts} mixed ({input_lens[0]}-{input_lens[1]} in, "
        f"{output_lens[0]}-{output_lens[1]} out)"
    )
    return Workload(name, prompts, outputs)


def shared_prefix(
    num_prompts: int,
    prefix_len: int,
    own_len: int,
    output_len: int,
    *,
    vocab_size: int,
    seed: int = 0,
) -> Workload:
    """Prompts that begin with the same tokens."""
    rng = random.Random(seed)
    prefix = _tokens(rng, prefix_len, vocab_size)
    return Workload(
        f"{num_prompts} sharing {prefix_len} ({own_len} own, {output_len} out)",
        [prefix + _tokens(rng, own_len, vocab_size) for _ in range(num_prompts)],
        [output_len] * num_prompts,
    )
