"""A KV cache in codes: what is kept of keys and values, and that attention is of just that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.kv_rows import LARGEST_CODE, row_width
from quire.kernels.reference.cache import decode_rows

CPU = torch.device("cpu")
CODES = list(LARGEST_CODE)
ALL_CODES = {
    torch.int8: torch.arange(-127, 128, dtype=torch.int8),
    torch.float8_e4m3fn: torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
}

codes = st.sampled_from(CODES)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**32 - 1)


def numbers_of(dtype: torch.dtype) -> torch.Tensor:
    """Every number that a code of that type can be, in float64."""
    numbers = ALL_CODES[dtype].float().double()
    return numbers[numbers.isfinite()].unique()


def written(backend, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as they lie in a cache, in bytes."""
    tokens, heads, dim = rows.shape
    keys, values = backend.allocate_kv_cache(tokens + 1, 1, heads, dim, dtype, CPU)
    backend.write_kv(rows, rows, keys, values, torch.arange(tokens) + 1)
    assert torch.equal(keys.view(torch.uint8), values.view(torch.uint8))
    assert not keys[0].view(torch.uint8).any()
    return keys.view(torch.uint8)[1:, 0]


@given(
    seed=seeds,
    dtype=codes,
    source=floats,
    tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    size=st.sampled_from([1e-6, 0.1, 1.0, 300.0]),
)
def test_a_row_is_kept_in_the_nearest_codes_of_its_own_scale(
    backend, seed, dtype, source, tokens, heads, dim, size
):
    """The scale takes the row's largest number to the last code; no code would be nearer."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(tokens, heads, dim, generator=generator) * size).to(source)
    got = written(backend, rows, dtype)
    scales = got[..., dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    largest = rows.float().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scales, largest / LARGEST_CODE[dtype], rtol=1e-6, atol=0)
    kept = got[..., :dim].clone().view(dtype).float().double()
    steps = torch.where(scales > 0, rows.double() / scales.double(), 0.0)
    away = (steps[..., None] - numbers_of(dtype)).abs().amin(-1)
    assert ((kept - steps).abs() <= away + 1e-4).all()
    assert torch.equal(decode_rows(got, dtype).double(), (kept * scales).float().double())


@given(seed=seeds, dtype=codes, dim=st.integers(1, 20))
def test_zeros_stay_zeros_and_what_is_no_number_stays_in_its_row(backend, seed, dtype, dim):
    """Rows of zeros and of the smallest numbers are kept; a NaN or an infinity makes a row NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 1, dim, generator=generator)
    rows[0], rows[1] = 0, 1e-45
    rows[2, 0, -1], rows[3, 0, 0] = torch.nan, -torch.inf
    plain = rows.clone()
    plain[2:4] = 1
    got = decode_rows(written(backend, rows, dtype), dtype)
    assert not got[0].any()
    assert got[1].isfinite().all()
    assert got[2:4].isnan().all()
    assert torch.equal(got[4:], decode_rows(written(backend, plain, dtype), dtype)[4:])


@given(
    seed=seeds,
    dtype=codes,
    source=floats,
    lens=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.integers(1, 2),
    shared_by=st.integers(1, 3),
    dim=st.sampled_from([1, 7, 8, 16]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 5]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_attention_is_that_of_what_the_codes_stand_for(
    backend, seed, dtype, source, lens, heads, shared_by, dim, block_size, window, softcap
):
    """The same bits as over a float32 cache of the numbers that the codes stand for."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [query + context for query, context in lens]
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 2
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    shape = ((num_blocks - 1) * block_size, heads, dim)
    slots = torch.arange(shape[0]) + block_size
    caches = backend.allocate_kv_cache(num_blocks, block_size, heads, dim, dtype, CPU)
    rows = torch.randn(2, *shape, generator=generator)
    backend.write_kv(rows[0], rows[1], *caches, slots)
    floats = [decode_rows(cache.view(torch.uint8), dtype) for cache in caches]
    query_lens = [query for query, _ in lens]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    query = torch.randn(sum(query_lens), heads * shared_by, dim, generator=generator).to(source)
    results = []
    for keys, values in (caches, floats):
        plan = backend.plan_attention(
            starts, torch.tensor(seq_lens, dtype=torch.int32), tables, block_size
        )
        results.append(
            backend.paged_attention(
                query,
                keys,
                values,
                plan,
                scale=dim**-0.5,
                sliding_window=window,
                softcap=softcap,
            )
        )
    assert results[0].dtype is source
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", CODES)
def test_memory_of_a_cache_in_codes_is_taken_when_it_is_written(backend, dtype):
    """Whole rows, aligned, all zeros: one byte for a number and four for a row's scale."""
    for cache in backend.allocate_kv_cache(1 << 20, 16, 4, 64, dtype, CPU):
        assert cache.shape == (1 << 20, 16, 4, 68)
        assert row_width(64, dtype) == 68
        assert cache.dtype is dtype
        assert cache.data_ptr() % 64 == 0
        assert not cache[-1].view(torch.uint8).any()
