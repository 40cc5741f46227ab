"""The check of an adapter against a decoder, before anything is made of its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quire.errors import AdapterError
from quire.models.adapter import Adapter, DeltaSlice, EmbeddingDelta, LinearDelta
from quire.models.linear import Linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_adapter(
    adapter: Adapter, linears: Mapping[str, Linear], vocab_size: int, embedding_size: int
) -> None:
    """Check that every tensor has the shape and the type that the decoder will read it with.

    Parameters
    ----------
    adapter
    linears
        The decoder's projections by name.
    vocab_size, embedding_size
        Shape of its embedding.

    Raises
    ------
    AdapterError
        The adapter does not fit; the message names what of it.
    """
    for name, delta in adapter.linears.items():
        if name not in linears:
            raise AdapterError(f"the adapter is for {name!r}; the model has no such projection")
        _check_linear(name, delta, linears[name])
    if adapter.embedding is not None:
        _check_embedding(adapter.embedding, vocab_size, embedding_size)
    for name in ("embed_weight", "lm_head_weight"):
        table = getattr(adapter, name)
        if table is not None:
            _check(name, table, (vocab_size, embedding_size))
    dtypes = sorted({str(each.dtype) for each in _matrices(adapter)})
    if len(dtypes) > 1:
        raise AdapterError(f"the adapter's tensors are {' and '.join(dtypes)}; they must be of one")


def _check_linear(name: str, delta: LinearDelta, linear: Linear) -> None:
    total_rank = delta.scales.numel()
    _check(f"{name}: scales", delta.scales, (total_rank,), torch.float32)
    _check(f"{name}: a", delta.a, (total_rank, linear.in_features))
    end = 0
    for part in sorted(delta.slices, key=lambda each: each.first_row):
        end = _check_slice(f"{name}: b", part, end, linear.out_features, total_rank)
    for what, vector in (("bias", delta.bias), ("factor", delta.factor)):
        if vector is not None:
            _check(f"{name}: {what}", vector, (linear.out_features,), torch.float32)


def _check_slice(
    name: str, part: DeltaSlice, first_free: int, out_features: int, total_rank: int
) -> int:
    if part.b.dim() != 2:
        raise AdapterError(f"{name} has the shape {list(part.b.shape)}; it must be a matrix")
    _check(name, part.b, tuple(part.b.shape))
    num_rows, rank = part.b.shape
    end, end_rank = part.first_row + num_rows, part.first_rank + rank
    if not first_free <= part.first_row <= end <= out_features:
        raise AdapterError(
            f"{name} is for the outputs {part.first_row} to {end - 1}; they must lie within the "
            f"projection's {out_features}, each in one slice"
        )
    if not 0 <= part.first_rank <= end_rank <= total_rank:
        raise AdapterError(
            f"{name} reads the ranks {part.first_rank} to {end_rank - 1}; there are {total_rank}"
        )
    return end


def _check_embedding(delta: EmbeddingDelta, vocab_size: int, embedding_size: int) -> None:
    rank = delta.a.shape[-1] if delta.a.dim() else 0
    _check("embedding: a", delta.a, (vocab_size, rank))
    _check("embedding: b", delta.b, (embedding_size, rank))


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"{name} has the shape {list(tensor.shape)}; the model needs {list(shape)}"
        )
    if tensor.dtype not in ((dtype,) if dtype else _DTYPES):
        wanted = dtype or "float32, bfloat16 or float16"
        raise AdapterError(f"{name} is {tensor.dtype}; it must be {wanted}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise AdapterError(f"{name} must be contiguous, and on the CPU")


def _matrices(adapter: Adapter) -> list[torch.Tensor]:
    vectors = {
        id(each)
        for delta in adapter.linears.values()
        for each in (delta.scales, delta.bias, delta.factor)
    }
    return [each for each in adapter.tensors() if id(each) not in vectors]
