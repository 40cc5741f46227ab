"""split_batch: one step as several, which follow each other through the stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quire.engine.batch import ForwardBatch

_LEAST_TOKENS = 64
"""Of a piece: with fewer, reading the weights once more costs what the stages gain."""


def count_pieces(num_tokens: int, num_stages: int) -> int:
    """Return in how many pieces a step goes through the stages."""
    return min(num_stages, max(1, num_tokens // _LEAST_TOKENS))


def split_batch(batch: ForwardBatch, count: int) -> Iterator[ForwardBatch]:
    """Cut a batch between tokens; computed one after the other, the pieces are the whole.

    Parameters
    ----------
    batch
    count
        Of pieces, as even as can be; at most one for each token.
    """
    if count <= 1:
        yield batch
        return
    cuts = torch.linspace(0, batch.num_tokens, count + 1, dtype=torch.float64).round().long()
    for first, end in zip(cuts.tolist(), cuts[1:].tolist(), strict=False):
        if first < end:
            yield _piece(batch, first, end)


def _piece(batch: ForwardBatch, first: int, end: int) -> ForwardBatch:
    starts = batch.query_start_loc[:-1].clamp(first, end)
    ends = batch.query_start_loc[1:].clamp(first, end)
    there = ends > starts
    # What a sequence has in the cache once the piece has run: less what comes later.
    seq_lens = batch.seq_lens - (batch.query_start_loc[1:] - ends)
    lengths = (ends - starts)[there]
    query_start_loc = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
    query_start_loc[1:] = lengths.cumsum(0)
    tokens = slice(first, end)
    slots = batch.adapter_slots
    return ForwardBatch(
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        query_start_loc=query_start_loc,
        seq_lens=seq_lens[there],
        block_tables=batch.block_tables[there.to(batch.block_tables.device)],
        slot_mapping=batch.slot_mapping[tokens],
        logits_indices=batch.logits_indices[:0],
        adapter_slots=None if slots is None else slots[tokens],
    )
