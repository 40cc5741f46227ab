"""The paged KV cache on a GPU: what is prepared for the kernel that writes into it."""

from __future__ import annotations

import torch

from quire.kernels.triton.kv_cache_kernel import write_rows

KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""What the kernels call the types of codes; everything else is "float"."""

_NUMBERS = 2048
"""So many numbers, about, a program writes of keys, and as many of values."""


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `quire.kernels.interface.Backend.write_kv`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    num_rows = num_tokens * num_kv_heads
    if num_rows == 0:
        return
    kind = KINDS.get(key_cache.dtype, "float")
    if kind != "float":
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    if key.stride(2) != 1:
        key = key.contiguous()
    if value.stride(2) != 1:
        value = value.contiguous()
    width = 1 << (head_dim - 1).bit_length()
    # A decode step has few rows: more programs write them at the same time.
    rows = max(1, _NUMBERS // width) if num_rows >= 4096 else 4
    write_rows[(-(-num_rows // rows),)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        num_rows,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        value_cache.stride(0),
        KIND=kind,
        BLOCK_SIZE=key_cache.shape[1],
        KV_HEADS=num_kv_heads,
        ROW_WIDTH=key_cache.shape[3],
        DIM=head_dim,
        WIDTH=width,
        ROWS=rows,
        num_warps=4 if rows * width >= 1024 else 2,
    )
