"""What of a model one rank has, where several compute it together.

Projections into heads and MLPs are split by their outputs, those back by their inputs, so that one
sum over the ranks ends each half of a layer (Shoeybi et al., arXiv:1909.08053). Embedding and
output matrix are split by tokens, mixtures by their experts or within each. Everything else is
whole on every rank of its stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from quire.errors import ConfigError
from quire.models.linear import Linear
from quire.models.mlp import is_expert
from quire.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from quire.parallel.place import Place

_VOCAB_BLOCK = 16
"""Ranks begin with a multiple of so many tokens: outputs of a block of the CPU's kernels."""


def split_spec(spec: DecoderSpec, place: Place) -> DecoderSpec:
    """Return what the layers of a model are on one rank.

    There are as many layers as ever, under their numbers; ``place.layers(spec.num_layers)`` says
    which of them are the rank's. What is not of layers stays as it is.

    Parameters
    ----------
    spec
        Of the whole model.
    place

    Raises
    ------
    ConfigError
        The model cannot be split so; the message has what would do.
    """
    if place.is_whole:
        return spec
    check_split(spec, place)
    return replace(spec, layers=tuple(split_layer(layer, place) for layer in spec.layers))


def split_layer(spec: LayerSpec, place: Place) -> LayerSpec:
    """Return what a layer is on a rank of its stage."""
    if place.tensor_size == 1:
        return spec
    return replace(
        spec,
        attention=_split_attention(spec.attention, place),
        mlp=_split_mlp(spec.mlp, place),
    )


def _split_attention(spec: AttentionSpec, place: Place) -> AttentionSpec:
    num_heads = spec.num_heads // place.tensor_size
    slopes = spec.alibi_slopes
    if slopes is not None:
        first = place.tensor_rank * num_heads
        slopes = slopes[first : first + num_heads]
    return replace(
        spec,
        num_heads=num_heads,
        num_kv_heads=max(1, spec.num_kv_heads // place.tensor_size),
        alibi_slopes=slopes,
    )


def _split_mlp(spec: MlpSpec, place: Place) -> MlpSpec:
    size, mixture = spec.intermediate_size, spec.experts
    if mixture is not None and mixture.shared_size is not None:
        mixture = replace(mixture, shared_size=mixture.shared_size // place.tensor_size)
    if mixture is not None and place.expert_parallel:
        mixture = replace(mixture, held=_experts(mixture.num_experts, place))
    else:
        size //= place.tensor_size
    return replace(spec, intermediate_size=size, experts=mixture)


def _experts(num_experts: int, place: Place) -> range:
    """Each rank has equally many, or, where that cannot be, the first ones one more."""
    each, more = divmod(num_experts, place.tensor_size)
    first = place.tensor_rank * each + min(place.tensor_rank, more)
    return range(first, first + each + (place.tensor_rank < more))


def split_linear(linear: Linear, place: Place) -> Linear:
    """Return a projection of the whole model with what a rank has of it.

    A bias that is added to a sum over the ranks is added by the first of them.
    """
    size, rank = place.tensor_size, place.tensor_rank
    if size == 1 or linear.split is None or (place.expert_parallel and is_expert(linear.name)):
        return linear
    if linear.split == "columns":
        columns = _chunk(linear.in_features, rank, size)
        return replace(linear, own_columns=columns, bias=linear.bias and rank == 0)
    rows = []
    for name, num_rows in linear.parts.items():
        # Ranks have a key/value head in common where there are fewer of these than ranks.
        ways = math.gcd(size, linear.groups) if name in ("k", "v") else size
        rows.append(_chunk(num_rows, rank * ways // size, ways))
    return replace(linear, own_rows=tuple(rows))


def _chunk(total: int, number: int, ways: int) -> range:
    each = total // ways
    return range(number * each, (number + 1) * each)


def vocab_chunk(vocab_size: int, tensor_size: int) -> int:
    """Return how many tokens each rank has in embedding and output matrix; the last has the rest.

    On one rank it is all of them.
    """
    if tensor_size == 1:
        return vocab_size
    return math.ceil(vocab_size / tensor_size / _VOCAB_BLOCK) * _VOCAB_BLOCK


def split_vocab(vocab_size: int, place: Place) -> range:
    """Return the tokens that a rank has in embedding and output matrix."""
    chunk = vocab_chunk(vocab_size, place.tensor_size)
    first = place.tensor_rank * chunk
    return range(first, min(first + chunk, vocab_size))


def check_split(spec: DecoderSpec, place: Place) -> None:
    """Check that a model can be split so.

    Raises
    ------
    ConfigError
        It cannot; the message names the sizes, and what would do.
    """
    if place.num_stages > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={place.num_stages}: the model has {spec.num_layers} layers; "
            f"at most {spec.num_layers} stages can share them"
        )
    experts = [layer.mlp.experts for layer in spec.layers if layer.mlp.experts is not None]
    if place.expert_parallel and not experts:
        raise ConfigError(
            "enable_expert_parallel=True: the model has no experts; leave it at False"
        )
    misfits = list(dict.fromkeys(_misfits(spec, place.tensor_size, place.expert_parallel)))
    if misfits:
        most = max(layer.attention.num_heads for layer in spec.layers)
        good = [n for n in range(1, most + 1) if not any(_misfits(spec, n, place.expert_parallel))]
        raise ConfigError(
            f"tensor_parallel_size={place.tensor_size} does not divide the model: it has "
            f"{', '.join(misfits)}; {', '.join(map(str, good))} would do"
        )


def _misfits(spec: DecoderSpec, size: int, expert_parallel: bool) -> Iterator[str]:
    """Name what so many ranks cannot share."""
    if (size - 1) * vocab_chunk(spec.vocab_size, size) >= spec.vocab_size:
        yield f"{spec.vocab_size} tokens in blocks of {_VOCAB_BLOCK}"
    for layer in spec.layers:
        attention, mlp, mixture = layer.attention, layer.mlp, layer.mlp.experts
        if attention.num_heads % size:
            yield f"{attention.num_heads} attention heads"
        if attention.num_kv_heads % size and size % attention.num_kv_heads:
            yield f"{attention.num_kv_heads} key/value heads"
        if mixture is not None and mixture.shared_size is not None and mixture.shared_size % size:
            yield f"a shared expert of the size {mixture.shared_size}"
        if mixture is not None and expert_parallel:
            if mixture.num_experts < size:
                yield f"{mixture.num_experts} experts"
        elif mlp.intermediate_size % size:
            yield f"an intermediate size of {mlp.intermediate_size}"
