"""A step in pieces is the same step."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.batch import ForwardBatch
from quire.executor.messages import pack, unpack
from quire.executor.pieces import split_batch
from quire.executor.wire import batch_from_message, batch_to_message

BLOCK = 4


def batch_of(sequences: list[tuple[int, int]], with_adapters: bool) -> ForwardBatch:
    """Return a batch of sequences that have so many tokens in the cache, and get so many."""
    lengths = torch.tensor([new for _, new in sequences], dtype=torch.int32)
    starts = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    positions = torch.cat([torch.arange(old, old + new) for old, new in sequences])
    num_tokens = len(positions)
    return ForwardBatch(
        input_ids=torch.randint(0, 100, (num_tokens,)),
        positions=positions,
        query_start_loc=starts,
        seq_lens=torch.tensor([old + new for old, new in sequences], dtype=torch.int32),
        block_tables=torch.randint(1, 50, (len(sequences), 8), dtype=torch.int32),
        slot_mapping=torch.randint(0, 200, (num_tokens,)),
        logits_indices=starts[1:].long() - 1,
        adapter_slots=torch.randint(-1, 3, (num_tokens,)).int() if with_adapters else None,
    )


sequences = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6)


@given(sequences, st.integers(1, 7), st.booleans())
def test_each_token_is_in_one_piece_and_sees_what_it_would(sequences, count, with_adapters):
    """Its place in its sequence is the last but those that come in the same piece after it."""
    batch = batch_of(sequences, with_adapters)
    count = min(count, batch.num_tokens)
    pieces = list(split_batch(batch, count))
    assert len(pieces) == count
    for name in ("input_ids", "positions", "slot_mapping", "adapter_slots"):
        whole = getattr(batch, name)
        if whole is not None:
            assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), whole)
    tables = {tuple(row.tolist()) for row in batch.block_tables}
    for piece in pieces:
        bounds = piece.query_start_loc.tolist()
        assert bounds[-1] == piece.num_tokens
        for i, (first, end) in enumerate(itertools.pairwise(bounds)):
            assert end > first
            length = int(piece.seq_lens[i])
            assert piece.positions[first:end].tolist() == list(range(length - end + first, length))
            assert tuple(piece.block_tables[i].tolist()) in tables


@given(sequences, st.booleans())
def test_a_step_travels(sequences, with_adapters):
    """All of it but what only the sampling rank needs; of block tables, what is in use."""
    batch = batch_of(sequences, with_adapters)
    message = unpack(pack({"batch": batch_to_message(batch, BLOCK)}))
    found = batch_from_message(message["batch"], torch.device("cpu"))
    for name in ("input_ids", "positions", "query_start_loc", "seq_lens", "slot_mapping"):
        assert torch.equal(getattr(found, name), getattr(batch, name))
        assert getattr(found, name).dtype == getattr(batch, name).dtype
    width = found.block_tables.shape[1]
    assert width == -(-int(batch.seq_lens.max()) // BLOCK)
    assert torch.equal(found.block_tables, batch.block_tables[:, :width])
    assert (found.adapter_slots is None) == (batch.adapter_slots is None)
