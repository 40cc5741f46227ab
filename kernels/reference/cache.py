"""The paged KV cache: its allocation, and the writing of keys and values into it."""

from __future__ import annotations

import math

import numpy as np
import torch

_ALIGNMENT = 64


def allocate_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.allocate_kv_cache`."""
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    if device.type != "cpu":
        return (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
    return _lazy_zeros(shape, dtype), _lazy_zeros(shape, dtype)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # torch.zeros writes every page; numpy's zeros are calloc's, which the system hands out page
    # by page at the first write. Memory that no request ever needs is never taken.
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8))
    offset = -raw.data_ptr() % _ALIGNMENT
    return raw[offset : offset + num_bytes].view(dtype).view(shape)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `quire.kernels.interface.Backend.write_kv`."""
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key.to(key_cache.dtype))
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value.to(value_cache.dtype))
