"""Random adapters for a decoder, and the decoder that has one merged into its weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quire.models.adapter import Adapter, DeltaSlice, EmbeddingDelta, LinearDelta
from quire.models.decoder import Decoder
from quire.models.linear import Linear, WeightMethod

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.models.linear import Apply
    from quire.models.weights import Weights

MAX_RANK = 6


def random_adapter(
    decoder: Decoder, seed: int, dtype: torch.dtype = torch.float32, strength: float = 0.3
) -> Adapter:
    """Any subset of projections and their parts, of any ranks, with or without all else."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    linears = {}
    for name, linear in decoder.linears().items():
        if rng.random() < 0.7:
            linears[name] = _random_delta(linear, rng, noise, dtype, strength)
    vocab_size, width = decoder.read_weight("embed").shape
    embedding = embed_weight = lm_head_weight = None
    if rng.random() < 0.4:
        rank = rng.randint(1, MAX_RANK)
        a, b = noise(vocab_size, rank).to(dtype), noise(width, rank).to(dtype)
        embedding = EmbeddingDelta(a, b, strength * rng.uniform(0.1, 0.3))
    if rng.random() < 0.3:
        embed_weight = (decoder.read_weight("embed") + 0.1 * noise(vocab_size, width)).to(dtype)
    if rng.random() < 0.3:
        lm_head_weight = decoder.read_weight("lm_head") + 0.1 * noise(vocab_size, width)
        lm_head_weight = lm_head_weight.to(dtype)
    return Adapter(f"digest {seed}", linears, embedding, embed_weight, lm_head_weight)


def _random_delta(
    linear: Linear,
    rng: random.Random,
    noise: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    strength: float,
) -> LinearDelta:
    """One slice for all outputs, or one for some of the parts; they may share ranks."""
    parts, first = [], 0
    for size in linear.parts.values():
        parts.append((first, size))
        first += size
    if rng.random() < 0.3:
        parts = [(0, first)]
    chosen = [part for part in parts if rng.random() < 0.8]
    slices, total_rank = [], 0
    for first, size in chosen:
        rank = rng.randint(1, MAX_RANK)
        start = total_rank
        if total_rank and rng.random() < 0.3:
            start = rng.randint(0, total_rank)
        total_rank = max(total_rank, start + rank)
        slices.append(DeltaSlice(first, start, noise(size, rank).to(dtype)))
    rng.shuffle(slices)
    bias = factor = None
    if linear.name != "lm_head" and rng.random() < 0.4:
        bias = 0.2 * noise(linear.out_features)
    if rng.random() < 0.4:
        factor = 1 + 0.2 * noise(linear.out_features)
    a = noise(total_rank, linear.in_features) * linear.in_features**-0.5
    scales = strength * torch.tensor([rng.uniform(0.2, 1) for _ in range(total_rank)])
    return LinearDelta(a.to(dtype), scales, tuple(slices), bias, factor)


def merged_weight(weight: torch.Tensor, delta: LinearDelta | None) -> torch.Tensor:
    """The weight that does what the projection and the adapter do, in float64."""
    merged = weight.double()
    if delta is None:
        return merged
    a = delta.a.double() * delta.scales.double()[:, None]
    for each in delta.slices:
        num_rows, rank = each.b.shape
        rows = slice(each.first_row, each.first_row + num_rows)
        merged[rows] += each.b.double() @ a[each.first_rank : each.first_rank + rank]
    return merged if delta.factor is None else merged * delta.factor.double()[:, None]


class MergedMethod(WeightMethod):
    """Projections with an adapter in their weights and biases, multiplied in float64."""

    def __init__(self, adapter: Adapter | None) -> None:
        self._linears = {} if adapter is None else adapter.linears

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        delta = self._linears.get(linear.name)
        weight = merged_weight(weights[f"{linear.name}.weight"], delta)
        bias = torch.zeros(linear.out_features, dtype=torch.float64)
        for each in (weights.get(f"{linear.name}.bias"), delta and delta.bias):
            if each is not None:
                bias = bias + each.double()
        return lambda x: (x.double() @ weight.T + bias).to(x.dtype)


def merged_decoder(decoder: Decoder, kernels: Backend, adapter: Adapter | None) -> Decoder:
    """A float32 decoder like another one, with an adapter merged into its weights.

    The other one is of the reference kernels: native ones have its weights in an order of theirs.
    """
    spec = replace(decoder.spec, tie_word_embeddings=False)
    merged = Decoder(
        spec,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=kernels,
        method=MergedMethod(adapter),
    )
    tables = {"embed.weight": decoder.read_weight("embed").double()}
    tables["lm_head.weight"] = decoder.read_weight("lm_head").double()
    if adapter is not None:
        if adapter.embed_weight is not None:
            tables["embed.weight"] = adapter.embed_weight.double()
        if adapter.embedding is not None:
            delta = adapter.embedding
            gain = delta.scale * delta.a.double() @ delta.b.double().T
            tables["embed.weight"] = tables["embed.weight"] + gain
        if adapter.lm_head_weight is not None:
            tables["lm_head.weight"] = adapter.lm_head_weight
        delta_of_head = adapter.linears.get("lm_head")
        tables["lm_head.weight"] = merged_weight(tables["lm_head.weight"], delta_of_head)
    for name in merged.weights.names():
        table = tables.get(name)
        merged.weights[name].copy_(decoder.weights[name] if table is None else table)
    merged.bind()
    return merged
