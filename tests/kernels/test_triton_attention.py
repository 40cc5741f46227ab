"""Triton's attention and KV cache, against plain torch: on a GPU, or in its interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from attention_cases import Case, cases, slopes_of, softcaps, tolerance, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.kv_rows import LARGEST_CODE, is_coded
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.triton import attention_plan, attention_work
from quire.kernels.triton.attention_tiles import Tiles
from quire.kernels.triton.backend import TritonBackend

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and not TRITON_INTERPRET=1", allow_module_level=True)

# The interpreter computes by numpy, which warns of what is no number.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.filterwarnings("ignore:overflow"),
    pytest.mark.filterwarnings("ignore:All-NaN"),
]

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# numpy has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
HEAD_DIMS = (4, 16, 20, 32, 64, 80)

triton_backend, reference = TritonBackend(), ReferenceBackend()
# The interpreter takes its time.
few = settings(max_examples=settings.default.max_examples // 10)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles so small that short sequences have many; but for tests that ask for real ones."""
    if "real_tiles" in request.fixturenames:
        return
    tiles = (Tiles(16, 16, 4, 2, 6, 16), Tiles(32, 16, 4, 2, 4, 32))
    monkeypatch.setattr(attention_plan, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(attention_work, "KEYS_UNIT", 16)


@pytest.fixture
def real_tiles():
    """The tiles that are computed with, and not small ones."""


def check(case: Case, **options) -> None:
    got = case.run(triton_backend, DEVICE, **options)
    assert got.dtype is case.dtype
    assert got.shape == case.query.shape
    error = (got.double() - case.exact(**options)).abs().max().item()
    assert error <= tolerance(case)


@few
@given(case=cases(DTYPES, HEAD_DIMS), window=windows, softcap=softcaps, alibi=st.booleans())
def test_attention_is_its_definition(case, window, softcap, alibi):
    """Chunks and decode rows together, any sharing of heads, window, soft-cap and ALiBi."""
    check(case, sliding_window=window, softcap=softcap, alibi_slopes=slopes_of(case, alibi))


@pytest.mark.slow
@settings(max_examples=400)
@given(
    case=cases(DTYPES, (16, 64, 96, 112, 128, 256)),
    window=windows,
    softcap=softcaps,
    alibi=st.booleans(),
)
def test_attention_is_its_definition_by_real_tiles(real_tiles, case, window, softcap, alibi):
    """The same, as it is cut up for a GPU."""
    check(case, sliding_window=window, softcap=softcap, alibi_slopes=slopes_of(case, alibi))


@pytest.mark.parametrize(("head_dim", "window"), [(64, 300), (80, None), (128, 300), (256, None)])
def test_long_sequences_are_shared_out_by_real_tiles(real_tiles, head_dim, window):
    """A token after a long context and at its very edges, a chunk in the middle, short ones."""
    case = Case(
        [1, 40, 1, 1, 2],
        [700, 130, 255, 0, 127],
        num_kv_heads=1,
        shared_by=3,
        head_dim=head_dim,
        block_size=16,
        dtype=torch.float16,
    )
    check(case, sliding_window=window)


@pytest.mark.parametrize("block_size", [5, 16, 64])
@pytest.mark.parametrize("window", [None, 15, 16, 17])
def test_borders_of_blocks_tiles_and_windows(block_size, window):
    """Lengths one less, as much and one more than what keys are cut into."""
    lens = [15, 16, 17, 31, 32, 33]
    contexts = [*(each - 1 for each in lens), 16, 31]
    case = Case([1] * 6 + [17, 2], contexts, num_kv_heads=1, block_size=block_size)
    check(case, sliding_window=window)


@pytest.mark.parametrize("shared_by", [17, 40])
def test_heads_that_no_tile_has_room_for(shared_by):
    """Those that share a KV head are cut in two, if there are more than rows in a tile."""
    check(Case([1, 3, 1], [50, 20, 3], num_kv_heads=2, shared_by=shared_by))


@few
@given(case=cases(DTYPES, HEAD_DIMS), window=windows, softcap=softcaps, alibi=st.booleans())
def test_numbers_of_others_are_never_read(case, window, softcap, alibi):
    """NaN and infinity in every slot but a sequence's own, also in the null block, change no bit
    of its result; nor do entries of tables past its end."""
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "alibi_slopes": slopes_of(case, alibi),
    }
    clean = case.run(triton_backend, DEVICE, **options)
    victim = case.seed % len(case.query_lens)
    others = [row for row in range(len(case.contexts)) if row != victim]
    own = torch.cat([case.slots(row) for row in others] + [torch.empty(0, dtype=torch.int64)])
    for cache, bad in ((case.key_cache, torch.nan), (case.value_cache, torch.inf)):
        flat = cache.flatten(0, 1)
        kept = flat[own]
        flat.fill_(bad)
        flat[own] = kept
    case.query[case.starts[victim] : case.starts[victim + 1]] = torch.nan
    for row, length in enumerate(case.seq_lens):
        case.block_tables[row, -(-length // case.block_size) :] = 2**31 - 1 if row % 2 else -1
        if window is not None:
            unseen = max(0, case.contexts[row] + 1 - window) // case.block_size
            case.block_tables[row, :unseen] = -1
    dirty = case.run(triton_backend, DEVICE, **options)
    for row in others:
        own = slice(case.starts[row], case.starts[row + 1])
        assert torch.equal(dirty[own], clean[own])
    assert dirty[case.starts[victim] : case.starts[victim + 1]].isnan().all()


def test_a_plan_serves_layers_of_several_kinds():
    """Layers with other windows, heads and types of one step share a plan."""
    case = Case([1, 9, 1], [40, 3, 2])
    narrow = Case([1, 9, 1], [40, 3, 2], num_kv_heads=1, shared_by=3, dtype=torch.float16)
    narrow.block_tables = case.block_tables
    plan = case.plan(triton_backend.plan_attention, DEVICE)
    for _ in range(2):
        for window in (None, 5, 20):
            for layer in (case, narrow):
                got = triton_backend.paged_attention(
                    layer.query.to(DEVICE),
                    layer.key_cache.to(DEVICE),
                    layer.value_cache.to(DEVICE),
                    plan,
                    scale=layer.head_dim**-0.5,
                    sliding_window=window,
                )
                error = (got.cpu().double() - layer.exact(window)).abs().max().item()
                assert error <= tolerance(layer)


def test_views_are_read_as_they_are():
    """A query out of a fused projection, and caches whose blocks lie apart."""
    case = Case([1, 9, 1], [40, 3, 2])
    expected = case.run(triton_backend, DEVICE)
    num_tokens, num_heads, head_dim = case.query.shape
    wide = torch.full((num_tokens, num_heads + 3, head_dim), torch.nan, device=DEVICE)
    wide[:, :num_heads] = case.query
    case.query = wide[:, :num_heads]
    both = torch.stack((case.key_cache, case.value_cache), 1)
    case.key_cache, case.value_cache = both[:, 0], both[:, 1]
    assert torch.equal(case.run(triton_backend, DEVICE), expected)


@few
@given(
    case=cases(DTYPES, (7, 16, 20, 64)),
    dtype=st.sampled_from(list(LARGEST_CODE)),
    window=windows,
    softcap=softcaps,
    alibi=st.booleans(),
)
def test_attention_is_that_of_what_codes_stand_for(case, dtype, window, softcap, alibi):
    """Over keys and values that were written in codes, of any size of heads."""
    floats = case.key_cache, case.value_cache
    num_blocks, block_size, heads, dim = floats[0].shape
    caches = reference.allocate_kv_cache(num_blocks, block_size, heads, dim, dtype, DEVICE)
    rows = [each.flatten(0, 1).to(DEVICE) for each in floats]
    triton_backend.write_kv(*rows, *caches, torch.arange(len(rows[0]), device=DEVICE))
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "alibi_slopes": slopes_of(case, alibi),
    }
    case.key_cache, case.value_cache = (each.cpu() for each in caches)
    got = case.run(triton_backend, DEVICE, **options)
    # The reference rounds what codes stand for to the type that is computed in: not in float32.
    limit = tolerance_of_codes(case, floats[1])
    case.query = case.query.float()
    expected = case.run(reference, **options)
    assert (got.float() - expected).abs().max().item() <= limit


def tolerance_of_codes(case: Case, values: torch.Tensor) -> float:
    narrow = 0.0 if case.dtype is torch.float32 else 2 * torch.finfo(case.dtype).eps
    return (256 * torch.finfo(torch.float32).eps + narrow) * values.abs().max().item()


# Plans that are filled again and again


@pytest.mark.parametrize("backend", [reference, triton_backend], ids=["reference", "triton"])
@few
@given(data=st.data(), window=windows)
def test_a_plan_that_is_filled_again_is_that_of_the_step(backend, data, window):
    """Steps of fewer sequences, of any lengths; tensors stay, and empty sequences get zeros."""
    device = DEVICE if backend is triton_backend else torch.device("cpu")
    plan = backend.make_decode_plan(5, 30, 4, device)
    places = None
    for _ in range(3):
        lens = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=5))
        alive = [each for each in lens if each] or [1]
        case = Case([1] * len(alive), [each - 1 for each in alive], seed=len(lens))
        tables = torch.full((len(lens), case.block_tables.shape[1]), -1, dtype=torch.int32)
        query = torch.full((5, *case.query.shape[1:]), torch.nan)
        filled = [row for row, each in enumerate(lens) if each]
        for place, row in enumerate(filled):
            tables[row], query[row] = case.block_tables[place], case.query[place]
        backend.fill_decode_plan(plan, torch.tensor(lens, dtype=torch.int32), tables.to(device))
        got = backend.paged_attention(
            query.to(device),
            case.key_cache.to(device),
            case.value_cache.to(device),
            plan,
            scale=case.head_dim**-0.5,
            sliding_window=window,
        ).cpu()
        if filled:
            error = (got[filled].double() - case.exact(window)).abs().max().item()
            assert error <= tolerance(case)
        empty = [row for row in range(5) if row not in filled]
        assert not got[empty].any()
        if backend is triton_backend:
            kind = attention_plan.LayerKind(2, 2, 8, 4, False, plan.seen_through(window))
            (launch,) = plan.launches(kind)
            found = [plan.block_tables, launch.items, launch.merges]
            found = [each.data_ptr() for each in found]
            assert places in (None, found)
            places = found


@pytest.mark.skipif(not ON_GPU, reason="graphs are recorded on a GPU")
def test_a_step_may_be_recorded():
    """What is recorded once computes what the plan was filled with last."""
    case = Case([1] * 4, [90, 3, 40, 11], head_dim=64, dtype=torch.bfloat16)
    plan = triton_backend.make_decode_plan(6, 30, case.block_size, DEVICE)
    query = torch.zeros(6, *case.query.shape[1:], dtype=case.dtype, device=DEVICE)
    caches = case.key_cache.to(DEVICE), case.value_cache.to(DEVICE)

    def step() -> torch.Tensor:
        return triton_backend.paged_attention(query, *caches, plan, scale=64**-0.5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for count in (4, 2):
        query[:count] = case.query[:count].to(DEVICE)
        lens = torch.tensor(case.seq_lens[:count], dtype=torch.int32)
        triton_backend.fill_decode_plan(plan, lens, case.block_tables[:count].to(DEVICE))
        graph.replay()
        error = (out[:count].cpu().double() - case.exact()[:count]).abs().max().item()
        assert error <= tolerance(case)
        assert not out[count:].any()


# What programs are given to do


@given(
    sequences=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9000)), min_size=1),
    tokens=st.integers(1, 32),
    window=st.sampled_from([None, 1, 16, 300]),
    num_ranges=st.integers(1, 200),
)
def test_every_key_is_one_items_own(real_tiles, sequences, tokens, window, num_ranges):
    """Tiles have all tokens, items all keys of their tile, no more than these; they are few."""
    lens = np.array([query for query, _ in sequences])
    ends = np.array([query + context for query, context in sequences])
    starts = np.cumsum(lens) - lens
    rows = np.arange(len(lens))
    tiles = attention_work.tile_queries(rows, starts, lens, ends, tokens)
    seen = np.concatenate(
        [np.arange(a, a + b) for a, b in zip(tiles.tokens, tiles.counts, strict=True)]
    )
    assert np.array_equal(seen, np.arange(lens.sum()))
    assert tiles.counts.max() <= tokens
    work = attention_work.share_out(tiles, window, num_ranges, 128)
    assert work.items.shape[1] <= num_ranges + len(tiles.tokens)
    merges = {merge[0]: merge for merge in work.merges.T.tolist()}
    for row, token, count, end in zip(*tiles, strict=True):
        items = work.items[:, work.items[1] == token]
        items = items[:, items[4].argsort()]
        assert (items[:4] == [[row], [token], [count], [end]]).all()
        assert end == ends[row] - lens[row] + token - starts[row] + 1
        assert items[4, 0] == (0 if window is None else max(0, end - window))
        assert items[5, -1] == end + count - 1
        assert np.array_equal(items[4, 1:], items[5, :-1])
        assert not (items[4, 1:] % attention_work.KEYS_UNIT).any()
        if items.shape[1] == 1:
            assert items[6].tolist() == [-1]
            assert token not in merges
        else:
            _, merged, first, number = merges[token]
            assert (merged, number) == (count, items.shape[1])
            assert items[6].tolist() == list(range(first, first + number))
    assert work.num_parts == sum(merge[3] for merge in merges.values())


# Writing


@settings(max_examples=20)
@given(
    seed=seeds,
    source=st.sampled_from(DTYPES),
    dtype=st.sampled_from([*DTYPES, *LARGEST_CODE]),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 70)),
    block_size=st.sampled_from([1, 3, 16]),
    size=st.sampled_from([1e-42, 1e-6, 1.0, 300.0]),
)
def test_rows_are_written_as_the_reference_writes_them(
    seed, source, dtype, shape, block_size, size
):
    """The same bytes, codes and scales too, from views and in any order, but for negative slots."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, dim = shape
    wide = (torch.randn(tokens, 2 * heads + 1, dim, generator=generator) * size).to(source)
    if tokens > 3:
        wide[1, 0, -1], wide[2, 0, 0], wide[3] = torch.nan, -torch.inf, 0
        wide[1, heads, 0], wide[2, -1, -1] = torch.inf, torch.nan
    key, value = wide[:, :heads], wide[:, heads : 2 * heads]
    num_blocks = 2 + tokens // block_size
    slots = torch.randperm((num_blocks - 1) * block_size, generator=generator)[:tokens]
    slots = (slots + block_size).where(torch.rand(tokens, generator=generator) < 0.8, -1)
    written = []
    for backend, device in ((reference, torch.device("cpu")), (triton_backend, DEVICE)):
        caches = backend.allocate_kv_cache(num_blocks, block_size, heads, dim, dtype, device)
        backend.write_kv(key.to(device), value.to(device), *caches, slots.to(device))
        written.append([each.cpu() for each in caches])
    for expected, got in zip(*written, strict=True):
        assert not expected[0].view(torch.uint8).any()
        if is_coded(dtype):
            expected, got = (each.view(torch.uint8) for each in (expected, got))
            scales = got[..., dim:].clone().view(torch.float32)
            others = expected[..., dim:].clone().view(torch.float32)
            # A NaN has many faces.
            assert torch.equal(scales.nan_to_num(-1.0), others.nan_to_num(-1.0))
            expected, got = expected[..., :dim], got[..., :dim]
        assert torch.equal(got.nan_to_num(12345.0), expected.nan_to_num(12345.0))


def test_every_number_becomes_the_nearest_code():
    """All of float16 up to a scale of 1, those that lie in the middle of two codes among them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    for dtype, largest in LARGEST_CODE.items():
        numbers = every[every.abs() <= largest]
        rows = numbers[: len(numbers) // 31 * 31].view(-1, 1, 31)
        rows = torch.cat((torch.full((len(rows), 1, 1), float(largest)), rows), -1)
        caches = [reference.allocate_kv_cache(len(rows), 1, 1, 32, dtype, DEVICE) for _ in "ab"]
        slots = torch.arange(len(rows), device=DEVICE)
        for backend, cache in zip((reference, triton_backend), caches, strict=True):
            backend.write_kv(rows.to(DEVICE), rows.to(DEVICE), *cache, slots)
        assert torch.equal(caches[0][1].view(torch.uint8), caches[1][1].view(torch.uint8))
