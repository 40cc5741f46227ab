"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.rotary_embedding`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if _are_neighbours(query, key):
        # Views of one projection: half as many calls, which is most of a small model's time.
        num_tokens, num_heads, head_dim = query.shape
        shape = (num_tokens, num_heads + key.shape[1], head_dim)
        both = _rotate(query.as_strided(shape, query.stride()), cos, sin, interleaved)
        return both[:, :num_heads], both[:, num_heads:]
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _are_neighbours(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the heads of `key` follow those of `query` in the memory of one tensor."""
    strides = query.stride()
    return (
        strides == key.stride()
        and query.dtype is key.dtype
        and key.storage_offset() - query.storage_offset() == query.shape[1] * strides[1]
        and query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    )


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate heads; `cos` and `sin` are `[num_tokens, 1, rotary_dim / 2]`."""
    num_tokens, num_heads, head_dim = x.shape
    half = cos.shape[2]
    is_partial = 2 * half < head_dim
    turned = x[:, :, : 2 * half] if is_partial else x
    axis = 3 if interleaved else 2
    pairs = turned.view(num_tokens, num_heads, *((half, 2) if interleaved else (2, half)))
    result = pairs * cos.unsqueeze(axis)
    (first, second), (new_first, new_second) = pairs.unbind(axis), result.unbind(axis)
    new_first.addcmul_(second, sin, value=-1)
    new_second.addcmul_(first, sin)
    rotated = result.view(num_tokens, num_heads, 2 * half).to(x.dtype)
    return torch.cat((rotated, x[:, :, 2 * half :]), 2) if is_partial else rotated
