"""Adapter: what a LoRA adapter adds to a decoder, in the decoder's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class DeltaSlice:
    """Some outputs of a projection, and what makes their share.

    Attributes
    ----------
    first_row : int
        The first output.
    first_rank : int
        The first of the columns that it reads of what the input was shrunk to.
    b : Tensor[num_rows, rank]
    """

    first_row: int
    first_rank: int
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LinearDelta:
    """What an adapter does to one (fused) projection.

    With ``s = scales * (x @ a.T)``, output rows of each slice gain ``s[its ranks] @ b.T``; then,
    where there is a factor, ``y = factor * (x @ weight.T + gain) + bias_of_the_model + bias``.
    No two slices have an output in common; outputs of no slice gain nothing.

    Attributes
    ----------
    a : Tensor[total_rank, in_features]
        Of all slices, one above the other; ``total_rank`` may be 0.
    scales : Tensor[total_rank], float32
        ``alpha / r`` or ``alpha / sqrt(r)``, for each row of `a`.
    slices : tuple of DeltaSlice
    bias : Tensor[out_features], float32, or None
        Added to the model's own.
    factor : Tensor[out_features], float32, or None
        DoRA's (Liu et al., arXiv:2402.09353): magnitude over norm of the adapted weight's rows.
    """

    a: torch.Tensor
    scales: torch.Tensor
    slices: tuple[DeltaSlice, ...]
    bias: torch.Tensor | None = None
    factor: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingDelta:
    """What an adapter adds to the embedding: ``scale * a[id] @ b.T``.

    Attributes
    ----------
    a : Tensor[vocab_size, rank]
    b : Tensor[embedding_size, rank]
    scale : float
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter as it was read; all tensors on the CPU, contiguous, of one dtype unless said.

    Attributes
    ----------
    digest : str
        Of its content: equal digests, equal effect.
    linears : mapping of str to LinearDelta
        By the decoder's names: ``layers.{i}.attention.qkv``, ``layers.{i}.attention.out``,
        ``layers.{i}.mlp.gate_up`` or ``layers.{i}.mlp.up``, ``layers.{i}.mlp.down``, ``lm_head``.
    embedding : EmbeddingDelta or None
    embed_weight : Tensor[vocab_size, embedding_size] or None
        Stands in for the model's embedding (not for a tied output matrix).
    lm_head_weight : Tensor[vocab_size, embedding_size] or None
        Stands in for the model's output matrix.
    """

    digest: str
    linears: Mapping[str, LinearDelta]
    embedding: EmbeddingDelta | None = None
    embed_weight: torch.Tensor | None = None
    lm_head_weight: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors."""
        found: list[torch.Tensor | None] = [self.embed_weight, self.lm_head_weight]
        for delta in self.linears.values():
            found += [delta.a, delta.scales, delta.bias, delta.factor]
            found += [part.b for part in delta.slices]
        if self.embedding is not None:
            found += [self.embedding.a, self.embedding.b]
        return [each for each in found if each is not None]


@dataclass(eq=False)
class PreparedAdapter:
    """An adapter in the form that a decoder's kernels read; made by ``Decoder.prepare_adapter``.

    It is compared by identity, and lives as long as anybody refers to it.

    Attributes
    ----------
    digest : str
    num_bytes : int
        Memory that it takes.
    form : object
        What the decoder made of it.
    decoder : object
        The mark of the decoder that made it, which takes no other's.
    """

    digest: str
    num_bytes: int
    form: Any = field(repr=False)
    decoder: object = field(default=None, repr=False)
