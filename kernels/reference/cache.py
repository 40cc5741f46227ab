"""The paged KV cache: its allocation, and the writing of keys and values into it."""

from __future__ import annotations

import math

import numpy as np
import torch

from quire.kernels.kv_rows import LARGEST_CODE, SCALE_BYTES, is_coded, row_width

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
    shape = (num_blocks, block_size, num_kv_heads, row_width(head_dim, dtype))
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
    if slot_mapping.device.type != "cpu" or bool((slot_mapping < 0).any()):
        # What is not to be written becomes zeros for the null block, which is zero: to count the
        # others would be to wait for the device.
        is_left_out = (slot_mapping < 0)[:, None, None]
        key, value = key.masked_fill(is_left_out, 0), value.masked_fill(is_left_out, 0)
        slot_mapping = slot_mapping.clamp(min=0)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if is_coded(cache.dtype):
            slots = cache.view(torch.uint8).flatten(0, 1)
            slots.index_copy_(0, slot_mapping, encode_rows(rows, cache.dtype))
        else:
            cache.flatten(0, 1).index_copy_(0, slot_mapping, rows.to(cache.dtype))


def encode_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows in codes, as they lie in the KV cache.

    The scale is the largest size in a row over the code that this gets, and a code is what is
    nearest to ``x / scale``. Where the scale is 0 or no finite number, all codes are 0; what they
    stand for is then 0, or NaN.

    Parameters
    ----------
    rows : Tensor[..., head_dim]
    dtype : torch.dtype
        int8 or float8_e4m3fn.

    Returns
    -------
    Tensor[..., head_dim + 4], uint8
    """
    rows = rows.float()
    largest = LARGEST_CODE[dtype]
    scales = rows.abs().amax(-1, keepdim=True) / largest
    steps = (rows / scales).clamp(-largest, largest)
    # A scale below the normal numbers is so coarse that it may bring rows beyond the last code.
    steps = torch.where((scales > 0) & scales.isfinite(), steps, 0)
    if dtype == torch.int8:
        steps = steps.round()
    return torch.cat((steps.to(dtype).view(torch.uint8), scales.view(torch.uint8)), -1)


def decode_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what rows of codes stand for: the inverse of `encode_rows`.

    Parameters
    ----------
    rows : Tensor[..., head_dim + 4], uint8
        Contiguous.
    dtype : torch.dtype
        int8 or float8_e4m3fn.

    Returns
    -------
    Tensor[..., head_dim], float32
    """
    codes, scales = rows[..., :-SCALE_BYTES].view(dtype), rows[..., -SCALE_BYTES:]
    # Four bytes that lie anywhere are no float32 yet.
    scales = scales.clone(memory_format=torch.contiguous_format)
    return codes.float() * scales.view(torch.float32)
