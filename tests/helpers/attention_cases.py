"""Case: a step of attention over a paged KV cache, and what comes out of it by its definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """One step: sequences of `query_lens` new tokens after `contexts` older ones."""

    query_lens: list[int]
    contexts: list[int]
    num_kv_heads: int = 2
    shared_by: int = 2
    head_dim: int = 8
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.seq_lens = [q + c for q, c in zip(self.query_lens, self.contexts, strict=True)]
        self.starts = np.cumsum([0, *self.query_lens]).tolist()
        num_blocks = [-(-length // self.block_size) for length in self.seq_lens]
        total = sum(num_blocks) + 3
        free = (torch.randperm(total - 1, generator=generator) + 1).tolist()
        self.block_tables = torch.zeros(len(num_blocks), max(num_blocks) + 1, dtype=torch.int32)
        for row, count in enumerate(num_blocks):
            self.block_tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        shape = (total, self.block_size, self.num_kv_heads, self.head_dim)
        self.key_cache = torch.randn(shape, generator=generator).to(self.dtype)
        self.value_cache = torch.randn(shape, generator=generator).to(self.dtype)
        self.key_cache[0] = self.value_cache[0] = 0
        num_heads = self.num_kv_heads * self.shared_by
        query = torch.randn(self.starts[-1], num_heads, self.head_dim, generator=generator)
        self.query = query.to(self.dtype)

    def slots(self, row: int) -> torch.Tensor:
        positions = torch.arange(self.seq_lens[row])
        blocks = self.block_tables[row, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def plan(self, plan_attention, device="cpu"):
        return plan_attention(
            torch.tensor(self.starts, dtype=torch.int32),
            torch.tensor(self.seq_lens, dtype=torch.int32),
            self.block_tables.to(device),
            self.block_size,
        )

    def run(self, backend, device="cpu", **options) -> torch.Tensor:
        options = {
            name: each.to(device) if isinstance(each, torch.Tensor) else each
            for name, each in options.items()
        }
        return backend.paged_attention(
            self.query.to(device),
            self.key_cache.to(device),
            self.value_cache.to(device),
            self.plan(backend.plan_attention, device),
            scale=self.head_dim**-0.5,
            **options,
        ).cpu()

    def alone(self, row: int) -> Case:
        """The same sequence as the only one of its step, on the same caches."""
        case = Case([self.query_lens[row]], [self.contexts[row]], block_size=self.block_size)
        case.head_dim, case.dtype = self.head_dim, self.dtype
        case.key_cache, case.value_cache = self.key_cache, self.value_cache
        case.block_tables = self.block_tables[row : row + 1]
        case.query = self.query[self.starts[row] : self.starts[row + 1]]
        return case

    def exact(self, sliding_window=None, softcap=None, alibi_slopes=None) -> torch.Tensor:
        result = torch.empty(self.query.shape, dtype=torch.float64)
        for row, context in enumerate(self.contexts):
            slots = self.slots(row)
            keys = self.key_cache.flatten(0, 1)[slots].double()
            values = self.value_cache.flatten(0, 1)[slots].double()
            for step in range(self.query_lens[row]):
                token, last = self.starts[row] + step, context + step
                first = 0 if sliding_window is None else max(0, last + 1 - sliding_window)
                seen = slice(first, last + 1)
                for head in range(self.query.shape[1]):
                    kv_head = head // self.shared_by
                    scores = keys[seen, kv_head] @ self.query[token, head].double()
                    scores = scores * self.head_dim**-0.5
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if alibi_slopes is not None:
                        distance = torch.arange(first, last + 1) - last
                        scores = scores + alibi_slopes[head].double() * distance
                    result[token, head] = scores.softmax(0) @ values[seen, kv_head]
        return result


# Lengths around the borders of blocks, buckets and stacked queries, and some beyond.
query_lens = st.sampled_from([1, 1, 1, 2, 3, 5, 8, 16, 17, 33])
contexts = st.one_of(st.just(0), st.integers(0, 20), st.sampled_from([31, 32, 63, 100]))


@st.composite
def cases(draw, dtypes=DTYPES, head_dims=(4, 8, 20)):
    sequences = draw(st.lists(st.tuples(query_lens, contexts), min_size=1, max_size=6))
    return Case(
        query_lens=[query_len for query_len, _ in sequences],
        contexts=[context for _, context in sequences],
        num_kv_heads=draw(st.integers(1, 3)),
        shared_by=draw(st.sampled_from([1, 2, 3, 7])),
        head_dim=draw(st.sampled_from(head_dims)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
    )


windows = st.sampled_from([None, None, 1, 2, 7, 16, 40, 1000])
softcaps = st.sampled_from([None, None, 0.5, 30.0])


def slopes_of(case: Case, wanted: bool) -> torch.Tensor | None:
    num_heads = case.query.shape[1]
    return torch.logspace(0, -3, num_heads) if wanted else None


def tolerance(case: Case) -> float:
    """How far a weighted mean of values may be off.

    Scores are sums in float32 of `head_dim` products, values at most some units large. In 16
    bits, the weights may be rounded as well as the result.
    """
    largest = case.value_cache[case.value_cache.isfinite()].abs().max().item()
    wide = 64 * torch.finfo(torch.float32).eps
    narrow = 0.0 if case.dtype is torch.float32 else 1.5 * torch.finfo(case.dtype).eps
    return (wide + narrow) * largest
