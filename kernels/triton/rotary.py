"""rotary_embedding on a GPU: queries and keys in one launch, from wherever they lie."""

from __future__ import annotations

import torch

from quire.kernels.triton.configs import bucket, config_for
from quire.kernels.triton.rotary_kernel import rotate


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.rotary_embedding`."""
    query, key, cos, sin = map(_with_rows, (query, key, cos, sin))
    new_query, new_key = (
        torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (query, key)
    )
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, half = key.shape[1], cos.shape[1]
    if num_tokens == 0:
        return new_query, new_key
    config = config_for("rotary", query.device, head_dim=head_dim, dtype=str(query.dtype)[6:])
    heads = min(config["HEADS"], bucket(max(num_heads, num_kv_heads)))
    rest = head_dim - 2 * half
    rotate[(num_tokens, -(-num_heads // heads) + -(-num_kv_heads // heads))](
        query,
        key,
        cos,
        sin,
        new_query,
        new_key,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        cos.stride(0),
        sin.stride(0),
        INTERLEAVED=interleaved,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        PAIRS=bucket(half),
        REST=bucket(rest) if rest else 0,
        **{**config, "HEADS": heads},
    )
    return new_query, new_key


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last axis is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
