"""Each operation equals its definition, computed naively in float64, within stated bounds.

A bound is a multiple of the type's unit: ``finfo.eps`` times the largest number involved. A
16-bit result may be off by its own rounding and that of one or two steps before; a float32
result by as many roundings as a sum of some hundred terms may gather.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.reference import linear as reference_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view into a wider tensor, with NaN beside them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def assert_close(got: torch.Tensor, exact: torch.Tensor, *, units: float, scale: float) -> None:
    """Compare with float64 numbers; `units` of the last place of numbers as large as `scale`."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max().item() if got.numel() else 0.0
    bound = units * torch.finfo(got.dtype).eps * max(scale, 1e-6)
    assert error <= bound, f"off by {error:.3g}, more than {bound:.3g} ({got.dtype})"


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


# Norms


def exact_rms_norm(x, weight, eps, offset):
    x = x.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * (weight.double() + offset)


@given(
    seed=seeds,
    dtype=dtypes,
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    size=st.integers(1, 300),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1.0]),
    weighted=st.booleans(),
)
def test_rms_norm_is_its_definition(backend, seed, dtype, shape, size, magnitude, offset, weighted):
    """For any axes before the last, any strides, weights stored as they are or less 1."""
    x = strided(draw(seed, *shape, size) * magnitude).to(dtype)
    weight = draw(seed + 1, size, dtype=dtype) if weighted else None
    exact = exact_rms_norm(x, weight, 1e-6, offset)
    got = backend.rms_norm(x, weight, 1e-6, weight_offset=offset)
    assert got.dtype is dtype
    assert_close(got, exact, units=8 if dtype is torch.float32 else 1, scale=largest(exact))


@given(seed=seeds, dtype=dtypes, rows=st.integers(0, 6), size=st.integers(1, 300))
def test_add_rms_norm_is_a_sum_and_its_norm(backend, seed, dtype, rows, size):
    """The norm is of the sum as it is returned, so that both say the same; inputs stay."""
    x, residual = (draw(seed + i, rows, size, dtype=dtype) for i in range(2))
    before = x.clone(), residual.clone()
    weight = draw(seed + 2, size, dtype=dtype)
    normed, total = backend.add_rms_norm(x, residual, weight, 1e-5, weight_offset=1.0)
    assert_close(total, x.double() + residual.double(), units=1, scale=8)
    exact = exact_rms_norm(total, weight, 1e-5, 1.0)
    assert_close(normed, exact, units=8 if dtype is torch.float32 else 1, scale=largest(exact))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(1, 6),
    size=st.integers(2, 300),
    shift=st.sampled_from([0.0, 10.0]),
    biased=st.booleans(),
)
def test_layer_norm_is_its_definition(backend, seed, dtype, rows, size, shift, biased):
    """With and without weight and bias, also where the mean is far from 0."""
    x = strided(draw(seed, rows, size) + shift).to(dtype)
    weight = draw(seed + 1, size, dtype=dtype) if biased else None
    bias = draw(seed + 2, size, dtype=dtype) if biased else None
    wide = x.double()
    exact = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    if weight is not None and bias is not None:
        exact = exact * weight.double() + bias.double()
    # The mean's own rounding is divided by a standard deviation that may be small.
    spread = 1 + shift / wide.std(-1, correction=0).min().clamp(min=1e-2).item()
    units = 8 * spread if dtype is torch.float32 else 2
    assert_close(backend.layer_norm(x, weight, bias, 1e-5), exact, units=units, scale=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_do_not_overflow(backend, dtype):
    """Squares are summed in float32: 300 squared is more than float16 can hold."""
    x = torch.full((2, 64), 300.0, dtype=dtype)
    weight = torch.ones(64, dtype=dtype)
    assert_close(backend.rms_norm(x, weight, 1e-6), torch.ones(2, 64).double(), units=2, scale=1)
    assert torch.isfinite(backend.layer_norm(x, weight, weight, 1e-5)).all()


# Rotary embedding


def exact_rotary(x, cos, sin, interleaved):
    x, cos, sin = x.double().clone(), cos.double(), sin.double()
    half = cos.shape[1]
    for token, pair in itertools.product(range(len(x)), range(half)):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        a, b = x[token, :, i].clone(), x[token, :, j].clone()
        x[token, :, i] = a * cos[token, pair] - b * sin[token, pair]
        x[token, :, j] = b * cos[token, pair] + a * sin[token, pair]
    return x


@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.integers(1, 5),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    half=st.integers(1, 8),
    rest=st.sampled_from([0, 0, 2, 5]),
    interleaved=st.booleans(),
    fused=st.booleans(),
    wide_angles=st.booleans(),
)
def test_rotary_embedding_is_its_definition(
    backend, seed, dtype, tokens, heads, half, rest, interleaved, fused, wide_angles
):
    """Partial or whole, halves or neighbours, query and key of one projection or of two."""
    head_dim = 2 * half + rest
    qkv = draw(seed, tokens, sum(heads) + heads[1], head_dim, dtype=dtype)
    query, key, _ = qkv.split_with_sizes((*heads, heads[1]), 1)
    if not fused:
        query, key = query.clone(), strided(key)
    before = query.clone(), key.clone()
    angles = draw(seed + 1, tokens, half) * 10
    cos, sin = angles.cos(), angles.sin()
    if not wide_angles:
        cos, sin = cos.to(dtype), sin.to(dtype)
    got = backend.rotary_embedding(query, key, cos, sin, interleaved=interleaved)
    for x, original, result in zip((query, key), before, got, strict=True):
        assert torch.equal(x, original)
        assert result.dtype is dtype
        exact = exact_rotary(original, cos, sin, interleaved)
        assert_close(result, exact, units=2, scale=largest(original))
        assert torch.equal(result[:, :, 2 * half :], original[:, :, 2 * half :])


# Activations

EXACT = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("kind", EXACT)
@given(seed=seeds, dtype=dtypes, rows=st.integers(0, 5), size=st.integers(1, 70))
def test_activations_are_their_definitions(backend, kind, seed, dtype, rows, size):
    """Every kind, alone and times the other half."""
    x = draw(seed, rows, 2 * size, dtype=dtype) * 3
    before = x.clone()
    exact = EXACT[kind](x.double())
    assert_close(backend.activation(x, kind), exact, units=3, scale=largest(exact) + 1)
    gated = exact[:, :size] * x[:, size:].double()
    got = backend.act_and_mul(x, kind)
    assert_close(got, gated, units=3, scale=(largest(exact) + 1) * (largest(x) + 1))
    assert torch.equal(x, before)


def test_an_unknown_activation_is_named(backend):
    """Both say what was asked for and what there is."""
    x = torch.zeros(1, 2)
    for function in (backend.activation, backend.act_and_mul):
        with pytest.raises(ValueError, match=r"'swish'.*silu.*gelu_tanh"):
            function(x, "swish")


# Linear


def assert_is_product(got, x, weight, bias):
    exact = x.double() @ weight.double().t()
    sums = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact = exact + bias.double()
        sums = sums + bias.double().abs()
    size = weight.shape[1]
    # float32 sums gather up to a rounding per term; a 16-bit result is rounded once or twice.
    bound = torch.finfo(torch.float32).eps * math.sqrt(size) * 4 * sums
    if got.dtype is not torch.float32:
        bound = bound + torch.finfo(got.dtype).eps * (exact.abs() + 1)
    assert got.shape == exact.shape
    assert got.dtype is x.dtype
    assert ((got.double() - exact).abs() <= bound + 1e-30).all()


@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.one_of(st.integers(0, 6), st.sampled_from([17, 64, 300])),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    biased=st.booleans(),
)
def test_linear_is_a_matrix_product(backend, seed, dtype, rows, sizes, biased):
    """For any number of rows and any shape, odd ones too."""
    x = draw(seed, rows, sizes[0], dtype=dtype)
    weight = draw(seed + 1, sizes[1], sizes[0], dtype=dtype)
    bias = draw(seed + 2, sizes[1], dtype=dtype) if biased else None
    assert_is_product(backend.linear(x, weight, bias), x, weight, bias)


@given(
    seed=seeds,
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    rows=st.sampled_from([1, 4, 33, 256, 257, 300]),
    in_features=st.sampled_from([1, 60, 701]),
    out_features=st.sampled_from([1, 16, 17, 100]),
    panel=st.sampled_from([1, 1000, 1 << 20]),
    biased=st.booleans(),
)
def test_panels_add_up_to_the_product(
    monkeypatch, seed, dtype, rows, in_features, out_features, panel, biased
):
    """The way around missing 16-bit instructions, also on a machine that has them."""
    monkeypatch.setattr(reference_linear, "_PANEL_SIZE", panel)
    x = draw(seed, rows, in_features, dtype=dtype)
    weight = draw(seed + 1, out_features, in_features, dtype=dtype)
    bias = draw(seed + 2, out_features, dtype=dtype) if biased else None
    assert_is_product(reference_linear._linear_by_panels(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("native", [False, True])
def test_threads_multiply_side_by_side(backend, monkeypatch, native):
    """Scratch memory belongs to a thread: results are those of one thread alone."""
    monkeypatch.setattr(reference_linear, "_is_native", lambda dtype: native)
    weight = draw(0, 300, 257, dtype=torch.bfloat16)
    inputs = [draw(i + 1, 8 + i, 257, dtype=torch.bfloat16) for i in range(8)]

    def multiply(x):
        with torch.inference_mode():
            return [backend.linear(x, weight) for _ in range(5)]

    expected = [multiply(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(multiply, inputs), expected, strict=True):
            assert all(torch.equal(result, wanted) for result in results)


def test_a_row_of_nan_stays_alone_in_a_product(backend):
    """A request whose numbers broke does not break its neighbours."""
    for dtype, rows in itertools.product(DTYPES, (2, 40)):
        x, weight = draw(0, rows, 300, dtype=dtype), draw(1, 200, 300, dtype=dtype)
        x[1] = torch.nan
        got = backend.linear(x, weight)
        assert got[1].isnan().all()
        assert not got[0].isnan().any()
        assert not got[2:].isnan().any()


# Tables and the cache


@given(
    seed=seeds,
    dtype=dtypes,
    index=st.sampled_from([torch.int32, torch.int64]),
    tokens=st.integers(0, 20),
)
def test_embedding_looks_up_rows(backend, seed, dtype, index, tokens):
    """Exactly the rows that are asked for."""
    weight = draw(seed, 11, 7, dtype=dtype)
    ids = torch.randint(11, (tokens,), generator=torch.Generator().manual_seed(seed)).to(index)
    got = backend.embedding(ids, weight)
    assert torch.equal(got, torch.stack([weight[i] for i in ids]) if tokens else weight[:0])


@given(
    seed=seeds,
    dtype=dtypes,
    cache_dtype=dtypes,
    tokens=st.integers(0, 12),
    block_size=st.sampled_from([1, 4, 16]),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
)
def test_write_kv_writes_its_slots_only(
    backend, seed, dtype, cache_dtype, tokens, block_size, heads, head_dim
):
    """Keys and values, views of one projection, land in their slots; all else stays."""
    num_blocks = 2 + tokens // block_size
    caches = backend.allocate_kv_cache(
        num_blocks, block_size, heads, head_dim, cache_dtype, torch.device("cpu")
    )
    qkv = draw(seed, tokens, 3 * heads, head_dim, dtype=dtype)
    _, *pair = qkv.split_with_sizes((heads,) * 3, 1)
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm((num_blocks - 1) * block_size, generator=generator)
    slots = free[:tokens] + block_size
    backend.write_kv(*pair, *caches, slots)
    for cache, rows in zip(caches, pair, strict=True):
        expected = torch.zeros(num_blocks * block_size, heads, head_dim, dtype=cache_dtype)
        for slot, row in zip(slots.tolist(), rows, strict=True):
            expected[slot] = row.to(cache_dtype)
        assert torch.equal(cache, expected.view(cache.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_memory_is_taken_when_it_is_written(backend, dtype):
    """A cache larger than what is used costs what is used."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gigabyte = 1 << 30
    before = resident()
    num_blocks = gigabyte // (16 * 4 * 64 * dtype.itemsize)
    caches = backend.allocate_kv_cache(num_blocks, 16, 4, 64, dtype, torch.device("cpu"))
    for cache in caches:
        assert cache.shape == (num_blocks, 16, 4, 64)
        assert cache.dtype is dtype
        assert cache.is_contiguous()
        assert cache.data_ptr() % 64 == 0
        assert not cache[0].any()
        assert not cache[-1].any()
    assert resident() - before < gigabyte // 16
    del caches, cache
    assert resident() - before < gigabyte // 16


def test_a_cache_that_does_not_fit_is_a_memory_error(backend):
    """And nothing else: the engine tells the user what to lower."""
    with pytest.raises(MemoryError):
        backend.allocate_kv_cache(1 << 40, 16, 8, 128, torch.float32, torch.device("cpu"))
