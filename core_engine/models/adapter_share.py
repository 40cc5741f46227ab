"""What of an adapter one rank needs, where a model is split among several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from quire.models.adapter import Adapter, DeltaSlice, LinearDelta
from quire.models.linear import Linear
from quire.parallel.place import Place


def share_of_adapter(
    adapter: Adapter, linears: Mapping[str, Linear], vocab_rows: range, place: Place
) -> Adapter:
    """Return a rank's share, in copies; summed over the ranks, the shares do what the whole does.

    Parameters
    ----------
    adapter
        Of the whole model.
    linears
        The projections that the rank has something of, and what that is.
    vocab_rows
        The tokens that it has.
    place
    """
    shares = {
        name: _share_of_delta(delta, linears[name], place)
        for name, delta in adapter.linears.items()
        if name in linears
    }
    embedding, embed, head = adapter.embedding, adapter.embed_weight, adapter.lm_head_weight
    if not place.is_first_stage:
        embedding = embed = None
    if not place.is_last_stage:
        head = None
    tokens = slice(vocab_rows.start, vocab_rows.stop)
    if embedding is not None:
        embedding = replace(embedding, a=embedding.a[tokens].clone())
    return Adapter(
        adapter.digest,
        shares,
        embedding,
        None if embed is None else embed[tokens].clone(),
        None if head is None else head[tokens].clone(),
    )


def _share_of_delta(delta: LinearDelta, linear: Linear, place: Place) -> LinearDelta:
    if linear.own_columns is not None:
        columns = slice(linear.own_columns.start, linear.own_columns.stop)
        # What is added once, and not by every rank.
        bias = delta.bias if place.tensor_rank == 0 else None
        return replace(delta, a=delta.a[:, columns].contiguous(), bias=bias)
    if linear.own_rows is None:
        return delta
    rows = linear.cut.index("")
    return replace(
        delta,
        slices=tuple(share for each in delta.slices for share in _own_slices(each, linear)),
        bias=None if delta.bias is None else delta.bias[rows],
        factor=None if delta.factor is None else delta.factor[rows],
    )


def _own_slices(part: DeltaSlice, linear: Linear) -> Iterator[DeltaSlice]:
    """What a slice is for outputs that are here, which may be in several places."""
    for run in linear.cut.runs(""):
        first = max(part.first_row, run.there)
        end = min(part.first_row + len(part.b), run.there + run.num_rows)
        if first < end:
            b = part.b[first - part.first_row : end - part.first_row]
            yield DeltaSlice(run.here + first - run.there, part.first_rank, b.clone())
