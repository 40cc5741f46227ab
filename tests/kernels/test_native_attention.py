"""The native library's attention over a bfloat16 cache, against its definition in float64."""

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

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

HIDDEN = 16
VOCAB = 50


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

    def __init__(self, shape: Shape, block_size: int, num_slots: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.library = load_library()
        self.context = self.library.quire_context_new()
        self.shape, self.block_size = shape, block_size
        self.embed = torch.randn(VOCAB, HIDDEN, generator=generator)
        width = (shape.heads + 2 * shape.kv_heads) * shape.dim
        self.qkv = torch.randn(width, HIDDEN, generator=generator) / HIDDEN**0.5
        self.out = torch.randn(HIDDEN, shape.heads * shape.dim, generator=generator)
        self.slopes = torch.rand(shape.heads, generator=generator) / 4
        # What was never written is no number; block 0 is always zero.
        self.caches = torch.full((2, num_slots, shape.kv_heads, shape.dim), torch.nan)
        self.caches = self.caches.bfloat16()
        self.caches[:, :block_size] = 0
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
            cache_dtype=structs.DTYPES["bfloat16"],
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
        key = key.bfloat16().double().repeat_interleave(shape.group, 0)
        value = value.bfloat16().double().repeat_interleave(shape.group, 0)
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
    layer.caches[:, layer.block_size :] = torch.nan
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
)
def test_attention_is_right_and_the_same_however_it_is_run(
    isa: str, shape: Shape, block_size: int, lengths: list[int], chunk: int, seed: int
) -> None:
    """For heads of any size; the same bits alone, among others, in chunks and in any blocks."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    num_slots = block_size * (1 + len(lengths) * -(-max(lengths) // block_size))
    layer = OneLayer(shape, block_size, num_slots, seed)
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
