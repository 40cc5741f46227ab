"""Which parameters a decoder has, and which of them, or how much of each, one rank."""

from __future__ import annotations

from quire.models.layers import create_layer, create_norm, layer_linears, own_linears
from quire.models.linear import Linear, LinearMethod, WeightMethod
from quire.models.spec import DecoderSpec
from quire.models.split import split_vocab
from quire.models.weights import Weights
from quire.parallel.place import WHOLE, Place


def table(name: str, spec: DecoderSpec, place: Place = WHOLE) -> Linear:
    """Return the embedding, or the output matrix, as a projection."""
    size, width = spec.vocab_size, spec.embedding_size or spec.hidden_size
    rows = (split_vocab(size, place),) if place.tensor_size > 1 else None
    return Linear(name, width, {name: size}, own_rows=rows)


def embedding_linears(spec: DecoderSpec) -> tuple[Linear | None, Linear | None]:
    """Return the projections to and from the hidden size, where embeddings have another width."""
    width = spec.embedding_size or spec.hidden_size
    if width == spec.hidden_size:
        return None, None
    return (
        Linear("project_in", width, {"hidden": spec.hidden_size}),
        Linear("project_out", spec.hidden_size, {"embedding": width}),
    )


def all_linears(spec: DecoderSpec) -> dict[str, Linear]:
    """Return the projections of all layers, and ``lm_head``, by name."""
    found = [
        linear
        for index, layer in enumerate(spec.layers)
        for linear in layer_linears(f"layers.{index}", layer, spec.hidden_size)
    ]
    return {each.name: each for each in (*found, table("lm_head", spec))}


def linears_of_rank(spec: DecoderSpec, place: Place) -> dict[str, Linear]:
    """Of `all_linears`, return those that a rank has something of, and what that is."""
    found = [
        linear
        for index in place.layers(spec.num_layers)
        for linear in own_linears(f"layers.{index}", spec.layers[index], spec.hidden_size, place)
    ]
    if place.is_last_stage:
        found.append(table("lm_head", spec, place))
    return {each.name: each for each in found}


def create_parameters(
    spec: DecoderSpec, method: LinearMethod, weights: Weights, place: Place = WHOLE
) -> None:
    """Enter what a rank has of the parameters, and the names of those that it has not.

    Parameters
    ----------
    spec
        Of the whole model.
    method
        How projections of layers are kept.
    weights
        To enter them in.
    place
    """
    _create(spec, method, weights, place)
    if not place.is_whole:
        everything = Weights(weights.device, weights.dtype)
        _create(spec, method, everything, WHOLE)
        weights.elsewhere.update({*everything.names()} - {*weights.names()})


def _create(spec: DecoderSpec, method: LinearMethod, weights: Weights, place: Place) -> None:
    plain, tied = WeightMethod(), spec.tie_word_embeddings
    project_in, project_out = embedding_linears(spec)
    if place.is_first_stage or (tied and place.is_last_stage):
        plain.create(table("embed", spec, place), weights)
    if place.is_first_stage and spec.learned_positions is not None:
        num_rows = spec.learned_positions.num_positions + spec.learned_positions.offset
        weights.create("embed_positions.weight", (num_rows, spec.hidden_size))
    if place.is_first_stage and project_in is not None:
        plain.create(project_in, weights)
    if place.is_last_stage and project_out is not None:
        plain.create(project_out, weights)
    for index in place.layers(spec.num_layers):
        create_layer(
            f"layers.{index}", spec.layers[index], spec.hidden_size, method, weights, place
        )
    if place.is_last_stage:
        create_norm("final_norm", spec.final_norm, spec.hidden_size, weights)
    if place.is_last_stage and not tied:
        plain.create(table("lm_head", spec, place), weights)
