"""Paged attention equals its definition, sequence by sequence, head by head, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import Case, cases, slopes_of, softcaps, tolerance, windows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.kernels.reference.attention_plan import plan_attention as plan_by_reference


@given(case=cases(), window=windows, softcap=softcaps, alibi=st.booleans())
def test_attention_is_its_definition(backend, case, window, softcap, alibi):
    """Chunks and decode rows together, any sharing of heads, window, soft-cap and ALiBi."""
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "alibi_slopes": slopes_of(case, alibi),
    }
    got = case.run(backend, **options)
    assert got.dtype is case.dtype
    assert got.shape == case.query.shape
    error = (got.double() - case.exact(**options)).abs().max().item()
    assert error <= tolerance(case)


@pytest.mark.slow
@settings(max_examples=30)
@given(case=cases(), window=windows, softcap=softcaps, alibi=st.booleans())
def test_attention_is_its_definition_at_length(backend, case, window, softcap, alibi):
    """The same, with another sequence that is long."""
    case = Case([*case.query_lens, 300], [*case.contexts, 900], dtype=case.dtype, seed=case.seed)
    test_attention_is_its_definition.hypothesis.inner_test(backend, case, window, softcap, alibi)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 50, 300])
def test_long_chunks_are_tiled(backend, window, softcap, alibi):
    """A chunk longer than a tile, after a context, beside decode rows."""
    case = Case([600, 1, 290], [77, 500, 0], shared_by=1, num_kv_heads=1, head_dim=4)
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "alibi_slopes": slopes_of(case, alibi),
    }
    got = case.run(backend, **options)
    assert (got.double() - case.exact(**options)).abs().max().item() <= tolerance(case)


@given(case=cases(), window=windows, softcap=softcaps, alibi=st.booleans())
def test_numbers_of_others_are_never_read(backend, case, window, softcap, alibi):
    """NaN and infinity in every slot that is not a sequence's own change no bit of its result.

    Slots of other sequences, of free blocks, and after the end of its own last block, where an
    earlier owner's numbers still stand.
    """
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "alibi_slopes": slopes_of(case, alibi),
    }
    clean = case.run(backend, **options)
    victim = case.seed % len(case.query_lens)
    own = torch.cat(
        [case.slots(row) for row in range(len(case.contexts)) if row != victim]
        + [torch.empty(0, dtype=torch.int64)]
    )
    null_block = torch.arange(case.block_size)
    for cache, bad in ((case.key_cache, torch.nan), (case.value_cache, torch.inf)):
        flat = cache.flatten(0, 1)
        kept = flat.clone()
        flat.fill_(bad)
        flat[own], flat[null_block] = kept[own], kept[null_block]
    case.query[case.starts[victim] : case.starts[victim + 1]] = torch.nan
    dirty = case.run(backend, **options)
    for row, start in enumerate(case.starts[:-1]):
        if row != victim:
            end = case.starts[row + 1]
            assert torch.equal(dirty[start:end], clean[start:end])


@given(case=cases([torch.float32]), window=windows, softcap=softcaps)
def test_neighbours_change_rounding_at_most(backend, case, window, softcap):
    """In float32, a sequence alone gets what it gets in the batch, but for the last digits."""
    together = case.run(backend, sliding_window=window, softcap=softcap)
    for row, start in enumerate(case.starts[:-1]):
        alone = case.alone(row).run(backend, sliding_window=window, softcap=softcap)
        torch.testing.assert_close(
            alone, together[start : case.starts[row + 1]], atol=tolerance(case), rtol=0
        )


@given(case=cases([torch.float32]), window=windows, data=st.data())
def test_chunks_add_up_to_the_whole(backend, case, window, data):
    """A prompt computed in two steps gets what it gets in one."""
    whole = case.run(backend, sliding_window=window)
    row = data.draw(st.integers(0, len(case.contexts) - 1))
    cut = data.draw(st.integers(0, case.query_lens[row] - 1))
    rest = case.alone(row)
    rest.query_lens, rest.contexts = [case.query_lens[row] - cut], [case.contexts[row] + cut]
    rest.starts = [0, rest.query_lens[0]]
    rest.query = rest.query[cut:]
    torch.testing.assert_close(
        rest.run(backend, sliding_window=window),
        whole[case.starts[row] + cut : case.starts[row + 1]],
        atol=tolerance(case),
        rtol=0,
    )


def test_blocks_out_of_the_window_are_not_read(backend):
    """Blocks that no token sees any more may belong to another sequence by now."""
    case = Case([1, 5], [40, 30], block_size=4)
    options = {"sliding_window": 6}
    exact = case.exact(**options)
    for row, context in enumerate(case.contexts):
        unseen = (context + 1 - 6) // case.block_size
        case.block_tables[row, :unseen] = 0
    got = case.run(backend, **options)
    assert (got.double() - exact).abs().max().item() <= tolerance(case)


def test_entries_past_the_end_of_a_table_mean_nothing(backend):
    """Whatever stands there, even block numbers that do not exist."""
    case = Case([1, 5, 1], [40, 3, 2], block_size=4)
    clean = case.run(backend)
    for row, length in enumerate(case.seq_lens):
        case.block_tables[row, -(-length // case.block_size) :] = 2**31 - 1 if row == 1 else -1
    assert torch.equal(case.run(backend), clean)


def test_a_plan_serves_layers_of_several_kinds(backend):
    """Layers with other windows, heads and types of one step share a plan."""
    case = Case([1, 9, 1], [40, 3, 2])
    wide = Case([1, 9, 1], [40, 3, 2], num_kv_heads=1, shared_by=3, dtype=torch.bfloat16)
    wide.block_tables = case.block_tables
    plan = case.plan(backend.plan_attention)
    for _ in range(2):
        for window in (None, 5, 20):
            for layer in (case, wide):
                got = backend.paged_attention(
                    layer.query,
                    layer.key_cache,
                    layer.value_cache,
                    plan,
                    scale=layer.head_dim**-0.5,
                    sliding_window=window,
                )
                error = (got.double() - layer.exact(window)).abs().max().item()
                assert error <= tolerance(layer)


def test_a_query_may_be_a_view(backend):
    """As it comes out of a fused projection, beside keys and values."""
    case = Case([1, 9, 1], [40, 3, 2])
    expected = case.run(backend)
    wide = torch.full((case.query.shape[0], case.query.shape[1] + 3, case.head_dim), torch.nan)
    wide[:, : case.query.shape[1]] = case.query
    case.query = wide[:, : case.query.shape[1]]
    assert torch.equal(case.run(backend), expected)


# The reference backend's own plan


@given(
    sequences=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 400)), min_size=1, max_size=40),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 3, 50]),
)
@example(sequences=[(1, 255)] * 32, block_size=16, window=None)
@example(sequences=[(1, 5000), (1, 5001)], block_size=16, window=None)
def test_a_plan_covers_each_token_once(sequences, block_size, window):
    """Every token has one place in the groups' results, every seen key is gathered for it,
    only own slots or the null block are read, and padding is bounded."""
    case = Case(
        [q for q, _ in sequences],
        [c for _, c in sequences],
        num_kv_heads=1,
        shared_by=1,
        head_dim=1,
        block_size=block_size,
    )
    layout = case.plan(plan_by_reference).layout(window)
    row_of = np.repeat(np.arange(len(sequences)), case.query_lens)
    places, owners, gathered, wanted = [], [], 0, 0
    for group in layout.groups:
        tokens = group.tokens
        if isinstance(tokens, slice):
            tokens = torch.arange(tokens.start, tokens.stop)
        tokens = tokens.view(group.num_seqs, group.max_query_len).numpy()
        slots = group.slots.view(group.num_seqs, group.max_kv_len)
        assert len(tokens) == group.num_seqs
        for own_tokens, own_slots, query_len, context in zip(
            tokens, slots, group.query_lens, group.contexts, strict=True
        ):
            row = row_of[own_tokens[0]]
            assert (row_of[own_tokens] == row).all()
            assert query_len == case.query_lens[row]
            kv_len = context + query_len
            every = case.slots(row)
            assert torch.equal(own_slots[:kv_len], every[len(every) - kv_len :])
            assert not own_slots[kv_len:].any()
            needed = len(every) if window is None else min(len(every), query_len + window - 1)
            assert kv_len >= needed
            assert kv_len < needed + block_size
            wanted += kv_len
        gathered += slots.numel()
        owners.append(tokens.reshape(-1))
    together = np.concatenate(owners)
    places = layout.order.numpy() if layout.order is not None else np.arange(len(together))
    assert len(set(places.tolist())) == len(row_of)
    assert (together[places] == np.arange(len(row_of))).all()
    # A quarter for lengths of one bucket, and what a merge may add to each group.
    assert gathered <= 1.34 * wanted + 64 * len(sequences) + 1024 * len(layout.groups)
