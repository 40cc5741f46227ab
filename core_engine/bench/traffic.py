"""Traffic: what a rank hands the others in a step, by the model's dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from quire.executor.pieces import count_pieces
from quire.models.split import vocab_chunk
from quire.parallel.shared_memory import CAPACITY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.models.spec import DecoderSpec
    from quire.parallel.place import Place

FLOAT = 4
"""Bytes of a number that ranks hand each other: all of them are float32."""

_SUMS = 2  # of a layer: what attention makes, and what the MLP makes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a model without experts.

    Attributes
    ----------
    num_layers, hidden_size, vocab_size : int
    embedding_size : int
        Width of the embedding, as a rule the hidden size.
    layer_weights, head_weights : int
        Numbers in a layer's matrices, and in the output matrix.
    num_heads, num_kv_heads, head_dim : int
        Of a layer.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    embedding_size: int
    layer_weights: int
    head_weights: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read it off a model's ``config.json``.

        Raises
        ------
        ValueError
            The model has experts, or layers that are not alike.
        """
        from quire.models.registry import build_spec

        return cls.of_spec(build_spec(config))

    @classmethod
    def of_spec(cls, spec: DecoderSpec) -> Shape:
        """Read it off a description; see `of`."""
        from quire.models.layers import layer_linears

        layer, hidden = spec.layers[0], spec.hidden_size
        heads = {(s.attention.num_heads, s.attention.num_kv_heads) for s in spec.layers}
        if any(each.mlp.experts is not None for each in spec.layers) or len(heads) > 1:
            raise ValueError("a model with experts, or whose layers are not alike")
        width = spec.embedding_size or hidden
        return cls(
            num_layers=spec.num_layers,
            hidden_size=hidden,
            vocab_size=spec.vocab_size,
            embedding_size=width,
            layer_weights=sum(
                linear.in_features * linear.out_features
                for linear in layer_linears("layer", layer, hidden)
            ),
            head_weights=width * spec.vocab_size,
            num_heads=layer.attention.num_heads,
            num_kv_heads=layer.attention.num_kv_heads,
            head_dim=layer.attention.head_dim,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank hands over.

    Attributes
    ----------
    operations : int
        Exchanges that it takes part in, those in which it only receives among them.
    num_bytes : int
        That it hands over.
    """

    operations: int
    num_bytes: int


def rank_traffic(
    shape: Shape,
    place: Place,
    num_tokens: int,
    num_rows: int,
    *,
    takes_logits: bool = False,
    capacity: int = CAPACITY,
) -> Traffic:
    """Count what one rank hands over in a step.

    Bytes are proportional to the tokens and rows, so that those of many steps are those of one step
    of all their tokens; operations are not.

    Parameters
    ----------
    shape
    place
        Which rank.
    num_tokens
        Computed in the step.
    num_rows
        Tokens after which one is chosen.
    takes_logits
        Whether by all of their logits, as where tokens are drawn; else by the likeliest alone.
    capacity
        Floats of a rank's slot.
    """
    size, stages = place.tensor_size, place.num_stages
    operations = num_bytes = 0
    if size > 1:
        widths = [shape.hidden_size] * (_SUMS * len(place.layers(shape.num_layers)))
        if place.is_first_stage:
            widths.append(shape.embedding_size)
        for tokens in _pieces(num_tokens, stages):
            for width in widths:
                operations += _turns(tokens * width, capacity)
                num_bytes += tokens * width * FLOAT
    step = num_tokens * shape.hidden_size * FLOAT
    if stages > 1:
        pieces = len(_pieces(num_tokens, stages))
        if not place.is_first_stage:
            operations += pieces
        if not place.is_last_stage:
            operations += pieces
            num_bytes += step
    is_home = stages > 1 and place.tensor_rank == 0
    if is_home and place.is_last_stage:
        operations += 1
        num_bytes += step
    elif is_home and place.is_first_stage:
        operations += 1
    if num_rows:
        row = 2 * FLOAT  # its likeliest token, and the logit
        share = row
        if takes_logits:
            row = shape.vocab_size * FLOAT
            share = vocab_chunk(shape.vocab_size, size) * FLOAT
        if size > 1 and place.is_last_stage:
            operations += _turns(num_rows * share // FLOAT, capacity)
            num_bytes += num_rows * share
        if is_home and place.is_last_stage:
            operations += 1
            num_bytes += num_rows * row
        elif is_home and place.is_first_stage:
            operations += 1
    return Traffic(operations, num_bytes)


def _pieces(num_tokens: int, num_stages: int) -> list[int]:
    """Return the tokens of each piece in which a step goes through the stages."""
    count = count_pieces(num_tokens, num_stages)
    cuts = [round(num_tokens * i / count) for i in range(count + 1)]
    return [end - first for first, end in pairwise(cuts)]


def _turns(count: int, capacity: int) -> int:
    return max(1, -(-count // capacity))
