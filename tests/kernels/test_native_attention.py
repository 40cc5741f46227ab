"""The native library's attention, over caches of every type, against its definition in float64."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isas import rounds_activations

from quire.kernels import available_backends
from quire.kernels.cpu import structs
from quire.kernels.cpu.library import load_library
from quire.kernels.kv_rows import is_coded, row_width
from quire.kernels.reference.cache import decode_rows, encode_rows

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

HIDDEN = 16
VOCAB = 50
CODES = [torch.int8, torch.float8_e4m3fn]


def as_cached(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a cache of that type keeps of rows, in float64."""
    if is_coded(dtype):
        return decode_rows(encode_rows(rows, dtype), dtype).double()
    return rows.to(dtype).double()


@dataclass
class Shape:
    """One layer of attention."""

    group: int
    kv_heads: int
    dim: int
    window: int
    softcap: float
    has_alibi: bool

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


class OneLayer:
    """A model that is an embedding, and one layer that is attention alone."""

    def __init__(
        self,
        shape: Shape,
        block_size: int,
        num_slots: int,
        seed: int,
        cache_dtype: torch.dtype = torch.bfloat16,
        qkv: torch.Tensor | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.library = load_library()
        self.context = self.library.quire_context_new()
        self.shape, self.block_size = shape, block_size
        self.embed = torch.randn(VOCAB, HIDDEN, generator=generator)
        width = (shape.heads + 2 * shape.kv_heads) * shape.dim
        self.qkv = torch.randn(width, HIDDEN, generator=generator) / HIDDEN**0.5
        if qkv is not None:
            self.embed, self.qkv = torch.eye(HIDDEN).repeat(4, 1)[:VOCAB], qkv
        self.out = torch.randn(HIDDEN, shape.heads * shape.dim, generator=generator)
        self.slopes = torch.rand(shape.heads, generator=generator) / 4
        self.cache_dtype = cache_dtype
        row = row_width(shape.dim, cache_dtype) * cache_dtype.itemsize
        self.caches = torch.zeros(2, num_slots, shape.kv_heads, row, dtype=torch.uint8)
        self.forget()
        self.kept: list[torch.Tensor] = []
        layer = structs.Layer(
            qkv=self.pack(self.qkv),
            out=self.pack(self.out),
            up=self.pack(torch.zeros(2, HIDDEN)),
            down=self.pack(torch.zeros(HIDDEN, 2)),
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            sliding_window=shape.window,
            scale=shape.dim**-0.5,
            softcap=shape.softcap,
            cache_dtype=structs.CACHE_DTYPES[str(cache_dtype).removeprefix("torch.")],
            alibi_slopes=self.slopes.data_ptr() if shape.has_alibi else None,
            key_cache=self.caches[0].data_ptr(),
            value_cache=self.caches[1].data_ptr(),
        )
        self.model = structs.Model(
            layers=ctypes.pointer(layer),
            num_layers=1,
            hidden_size=HIDDEN,
            embedding_size=HIDDEN,
            embed=structs.Matrix(blocks=self.embed.data_ptr()),
        )

    def forget(self) -> None:
        """What was never written is no number; block 0 is always zero."""
        self.caches[:, self.block_size :] = 255

    def pack(self, weight: torch.Tensor) -> structs.Matrix:
        out_features, in_features = weight.shape
        packed = weight.clone()
        tail = torch.zeros(structs.BLOCK * in_features)
        self.library.quire_pack(packed.data_ptr(), out_features, in_features, 0, tail.data_ptr(), 1)
        self.kept += [packed, tail]
        return structs.Matrix(packed.data_ptr(), tail.data_ptr(), None, in_features, out_features)

    def step(
        self, tables: torch.Tensor, parts: list[tuple[int, list[int]]], num_threads: int
    ) -> torch.Tensor:
        """Compute new tokens of each sequence, after so many old ones; return what is added."""
        tokens = torch.tensor([token for _, new in parts for token in new])
        positions = torch.tensor([old + i for old, new in parts for i in range(len(new))])
        slots = torch.tensor(
            [
                int(table[(old + i) // self.block_size]) * self.block_size
                + (old + i) % self.block_size
                for table, (old, new) in zip(tables, parts, strict=True)
                for i in range(len(new))
            ]
        )
        counts = torch.tensor([0] + [len(new) for _, new in parts])
        starts = counts.cumsum(0).to(torch.int32)
        lengths = torch.tensor([old + len(new) for old, new in parts], dtype=torch.int32)
        hidden = torch.empty(len(tokens), HIDDEN)
        batch = structs.Batch(
            *(each.data_ptr() for each in (tokens, positions, slots, starts, lengths, tables)),
            tables.stride(0),
            self.block_size,
            len(parts),
            len(tokens),
            hidden.data_ptr(),
        )
        status = self.library.quire_forward(self.context, self.model, batch, num_threads)
        assert status == 0
        return hidden - self.embed[tokens]

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """What a sequence's tokens get, in float64 but for the cache."""
        shape, count = self.shape, len(tokens)
        qkv = self.embed[tokens].double() @ self.qkv.double().T
        heads = qkv.view(count, -1, shape.dim).transpose(0, 1)
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads])
        key = as_cached(key.float(), self.cache_dtype).repeat_interleave(shape.group, 0)
        value = as_cached(value.float(), self.cache_dtype).repeat_interleave(shape.group, 0)
        scores = query @ key.transpose(1, 2) * shape.dim**-0.5
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        distance = torch.arange(count)[:, None] - torch.arange(count)
        if shape.has_alibi:
            scores -= self.slopes.double()[:, None, None] * distance
        hides = distance < 0
        if shape.window:
            hides |= distance >= shape.window
        weights = scores.masked_fill(hides, -torch.inf).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(count, -1) @ self.out.double().T


def run(
    layer: OneLayer, prompts: list[list[int]], chunk: int, num_threads: int, seed: int
) -> list[torch.Tensor]:
    """Go through sequences side by side, in chunks, their blocks in random order."""
    rng = random.Random(seed)
    per_sequence = -(-max(map(len, prompts)) // layer.block_size)
    blocks = list(range(1, 1 + per_sequence * len(prompts)))
    rng.shuffle(blocks)
    tables = torch.tensor(blocks, dtype=torch.int32).view(len(prompts), -1)
    results: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = 0
    while done < max(map(len, prompts)):
        rows = [i for i, prompt in enumerate(prompts) if done < len(prompt)]
        parts = [(done, prompts[i][done : done + chunk]) for i in rows]
        added = layer.step(tables[rows].contiguous(), parts, num_threads)
        for i, part in zip(rows, added.split([len(new) for _, new in parts]), strict=True):
            results[i].append(part)
        done += chunk
    layer.forget()
    return [torch.cat(parts) for parts in results]


@given(
    shape=st.builds(
        Shape,
        group=st.sampled_from([1, 2, 3, 7, 18]),
        kv_heads=st.integers(1, 3),
        dim=st.sampled_from([5, 16, 24, 32, 33, 64, 80, 96, 128, 256]),
        window=st.sampled_from([0, 0, 1, 20, 70]),
        softcap=st.sampled_from([0.0, 0.0, 2.0]),
        has_alibi=st.booleans(),
    ),
    block_size=st.sampled_from([3, 8, 16, 32, 48]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    chunk=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
    cache_dtype=st.sampled_from([torch.bfloat16, torch.float32, *CODES]),
)
def test_attention_is_right_and_the_same_however_it_is_run(
    isa: str,
    shape: Shape,
    block_size: int,
    lengths: list[int],
    chunk: int,
    seed: int,
    cache_dtype: torch.dtype,
) -> None:
    """For heads of any size; the same bits alone, among others, in chunks and in any blocks."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    num_slots = block_size * (1 + len(lengths) * -(-max(lengths) // block_size))
    layer = OneLayer(shape, block_size, num_slots, seed, cache_dtype)
    together = run(layer, prompts, max(lengths), 2, seed)
    if chunk < 4:  # few tokens at a time: of a shorter sequence
        prompts = [prompt[:40] for prompt in prompts]
    in_chunks = run(layer, prompts, chunk, 1, seed + 1)
    bound = 0.02 if rounds_activations(isa) else 0.005
    for prompt, ours, chunked in zip(prompts, together, in_chunks, strict=True):
        expected = layer.expected(prompt)
        assert torch.equal(ours[: len(prompt)], chunked)
        assert (chunked - expected).norm() <= bound * expected.norm()
    [alone] = run(layer, prompts[:1], max(lengths), 1, seed + 2)
    assert torch.equal(alone, in_chunks[0])
    layer.library.quire_context_free(layer.context)


def test_parts_of_a_long_sequence_are_merged_alike(isa: str) -> None:
    """One thread goes over the parts in order; several share them out, and merge what they give."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(1100)]]
    layer = OneLayer(Shape(2, 1, 32, 0, 0.0, False), 16, 16 * 70, 0)
    alone = run(layer, prompts, 1099, 1, 0)[0]
    shared = run(layer, prompts, 1099, 3, 1)[0]
    assert torch.equal(alone, shared)
    expected = layer.expected(prompts[0])
    assert (alone - expected).norm() <= 0.02 * expected.norm()
    layer.library.quire_context_free(layer.context)


def keep(layer: OneLayer, tokens: list[int]) -> torch.Tensor:
    """Compute tokens of one sequence, in blocks 1, 2 and so on; return its part of the caches."""
    tables = torch.arange(1, layer.caches.shape[1] // layer.block_size, dtype=torch.int32)[None]
    layer.step(tables, [(0, tokens)], 1)
    return layer.caches[:, layer.block_size :][:, : len(tokens)].clone()


@given(
    dim=st.sampled_from([4, 5, 16, 33, 64, 80]),
    kv_heads=st.integers(1, 3),
    size=st.sampled_from([1.0, 1e-42, 1e-20, 1e30, 1e36]),
    has_none=st.booleans(),
    cache_dtype=st.sampled_from(CODES),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_those_of_the_reference(
    isa: str,
    dim: int,
    kv_heads: int,
    size: float,
    has_none: bool,
    cache_dtype: torch.dtype,
    seed: int,
) -> None:
    """The same bytes for the same keys and values, of any size, and of rows that are no numbers."""
    shape = Shape(1, kv_heads, dim, 0, 0.0, False)
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3 * kv_heads * dim, HIDDEN, generator=generator) * size
    if has_none:
        qkv[::dim, 3], qkv[dim - 1 :: dim, 5] = torch.nan, torch.inf
    tokens = list(range(HIDDEN))
    rows = keep(OneLayer(shape, 16, 48, seed, torch.float32, qkv), tokens).view(torch.float32)
    layer = OneLayer(shape, 16, 48, seed, cache_dtype, qkv)
    expected, got = encode_rows(rows, cache_dtype), keep(layer, tokens)
    # One NaN is as good as another.
    for each in (expected, got):
        each[..., dim:][rows.isnan().any(-1)] = 255
    assert torch.equal(got, expected)


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.parametrize("dim", [5, 24, 64])
def test_codes_stand_for_what_they_are_in_floats(
    isa: str, dim: int, cache_dtype: torch.dtype
) -> None:
    """Numbers that the codes have exactly give the bits that a bfloat16 cache of them gives."""
    generator = torch.Generator().manual_seed(dim)
    qkv = torch.randn(6 * dim, HIDDEN, generator=generator) / 500
    if cache_dtype == torch.int8:
        numbers, largest = torch.arange(-126.0, 127.0), 127.0
    else:
        numbers = torch.arange(256).to(torch.uint8).view(cache_dtype).float()
        numbers, largest = numbers[numbers.isfinite()], 448.0
    picks = torch.randint(len(numbers), (4 * dim, HIDDEN), generator=generator)
    qkv[2 * dim :] = numbers[picks]
    qkv[2 * dim :: dim] = largest  # with which the scale is 1
    shape = Shape(1, 2, dim, 0, 0.0, False)
    rng = random.Random(dim)
    prompts = [[rng.randrange(HIDDEN) for _ in range(length)] for length in (600, 70, 9)]
    results = []
    for dtype in (torch.bfloat16, cache_dtype):
        layer = OneLayer(shape, 16, 16 * 128, 0, dtype, qkv)
        results.append(run(layer, prompts, 50, 2, 0))
    for plain, coded in zip(*results, strict=True):
        assert torch.equal(plain, coded)
