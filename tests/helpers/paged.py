"""PagedRunner: a decoder driven by hand, through shuffled blocks and chunks of any size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from quire.engine.batch import ForwardBatch

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.models.decoder import Decoder


class PagedRunner:
    """Sequences over one paged KV cache; their blocks are scattered and interleaved.

    `adapters` is the slot of each sequence's adapter, -1 for none.
    """

    def __init__(
        self,
        decoder: Decoder,
        kernels: Backend,
        *,
        num_seqs: int,
        max_len: int,
        block_size: int = 8,
        seed: int = 0,
        adapters: Sequence[int] | None = None,
    ) -> None:
        self.decoder = decoder
        self.adapters = adapters
        self.lengths = [0] * num_seqs
        self._kernels = kernels
        self._block_size = block_size
        per_seq = -(-max_len // block_size)
        num_blocks = 1 + num_seqs * per_seq
        weights = decoder.weights
        self._caches = [
            kernels.allocate_kv_cache(
                num_blocks, block_size, num_kv_heads, head_dim, weights.dtype, weights.device
            )
            for num_kv_heads, head_dim in decoder.kv_cache_layers()
        ]
        blocks = list(range(1, num_blocks))  # block 0 is the null block
        random.Random(seed).shuffle(blocks)
        self.tables = torch.tensor(blocks, dtype=torch.int32).view(num_seqs, per_seq)

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Feed each listed sequence its next tokens; return the logits after each of them."""
        input_ids, positions, slots, starts, lengths, used = [], [], [], [0], [], []
        for seq, tokens in work:
            first = self.lengths[seq]
            self.lengths[seq] = end = first + len(tokens)
            input_ids += tokens
            positions += range(first, end)
            for position in range(first, end):
                block = int(self.tables[seq, position // self._block_size])
                slots.append(block * self._block_size + position % self._block_size)
            starts.append(len(input_ids))
            lengths.append(end)
            used.append(-(-end // self._block_size))
        tables = torch.zeros(len(work), max(used), dtype=torch.int32)
        for row, (seq, _) in enumerate(work):
            tables[row, : used[row]] = self.tables[seq, : used[row]]
        adapter_slots = None
        if self.adapters is not None:
            owners = [self.adapters[seq] for seq, tokens in work for _ in tokens]
            adapter_slots = torch.tensor(owners, dtype=torch.int32)
        query_start_loc = torch.tensor(starts, dtype=torch.int32)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        batch = ForwardBatch(
            input_ids=torch.tensor(input_ids),
            positions=torch.tensor(positions),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=tables,
            slot_mapping=torch.tensor(slots),
            logits_indices=torch.arange(len(input_ids)),
            adapter_slots=adapter_slots,
        )
        hidden = self.decoder.forward(batch, self._caches)
        logits = self.decoder.compute_logits(hidden, adapter_slots)
        return list(logits.split([len(tokens) for _, tokens in work]))

    def prefill(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[torch.Tensor]:
        """Feed whole prompts in chunks of random size, a random choice of sequences per step."""
        rng = random.Random(seed)
        logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        done = [0] * len(prompts)
        while pending := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
            work = []
            for seq in rng.sample(pending, rng.randint(1, len(pending))):
                end = min(done[seq] + rng.choice([1, 2, 7, 16, 33]), len(prompts[seq]))
                work.append((seq, list(prompts[seq][done[seq] : end])))
                done[seq] = end
            for (seq, _), rows in zip(work, self.step(work), strict=True):
                logits[seq].append(rows)
        return [torch.cat(rows) for rows in logits]

    def generate(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, *, seed: int
    ) -> list[list[int]]:
        """Decode greedily, all sequences in one batch."""
        last = [rows[-1] for rows in self.prefill(prompts, seed=seed)]
        outputs: list[list[int]] = [[] for _ in prompts]
        for _ in range(num_tokens):
            for output, row in zip(outputs, last, strict=True):
                output.append(int(row.argmax()))
            work = [(seq, [output[-1]]) for seq, output in enumerate(outputs)]
            last = [rows[-1] for rows in self.step(work)]
        return outputs
