"""How a step, and an adapter, travel: as dicts of tensors and plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quire.engine.batch import ForwardBatch
from quire.models.adapter import Adapter, DeltaSlice, EmbeddingDelta, LinearDelta

_OF_STEP = (
    "input_ids", "positions", "query_start_loc", "seq_lens", "slot_mapping", "adapter_slots",
)  # fmt: skip


def batch_to_message(batch: ForwardBatch, block_size: int) -> dict[str, Any]:
    """Return what other ranks need of a step."""
    message: dict[str, Any] = {name: _on_cpu(getattr(batch, name)) for name in _OF_STEP}
    used = -(-int(batch.seq_lens.max()) // block_size)
    message["block_tables"] = _on_cpu(batch.block_tables[:, :used])
    return message


def batch_from_message(message: dict[str, Any], device: torch.device) -> ForwardBatch:
    """Return the step that `batch_to_message` was given; without ``logits_indices``."""
    moved = {
        name: message[name].to(device)
        for name in ("input_ids", "positions", "slot_mapping", "block_tables")
    }
    return ForwardBatch(
        **moved,
        query_start_loc=message["query_start_loc"],
        seq_lens=message["seq_lens"],
        logits_indices=torch.empty(0, dtype=torch.int64, device="cpu"),
        adapter_slots=message["adapter_slots"],
    )


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def adapter_to_message(adapter: Adapter) -> dict[str, Any]:
    """Return all of an adapter."""
    return {
        "digest": adapter.digest,
        "linears": {name: _fields(delta) for name, delta in adapter.linears.items()},
        "embedding": None if adapter.embedding is None else _fields(adapter.embedding),
        "embed_weight": adapter.embed_weight,
        "lm_head_weight": adapter.lm_head_weight,
    }


def _fields(delta: LinearDelta | EmbeddingDelta | DeltaSlice) -> dict[str, Any]:
    found = {each.name: getattr(delta, each.name) for each in dataclasses.fields(delta)}
    if isinstance(delta, LinearDelta):
        found["slices"] = [_fields(part) for part in delta.slices]
    return found


def adapter_from_message(message: dict[str, Any]) -> Adapter:
    """Return the adapter that `adapter_to_message` was given."""
    linears = {}
    for name, delta in message["linears"].items():
        slices = tuple(DeltaSlice(**part) for part in delta["slices"])
        linears[name] = LinearDelta(**{**delta, "slices": slices})
    embedding = message["embedding"]
    return Adapter(
        digest=message["digest"],
        linears=linears,
        embedding=None if embedding is None else EmbeddingDelta(**embedding),
        embed_weight=message["embed_weight"],
        lm_head_weight=message["lm_head_weight"],
    )
