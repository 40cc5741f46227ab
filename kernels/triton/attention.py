"""Attention over the paged KV cache on a GPU: the launches of a layer."""

from __future__ import annotations

import math

import torch

from quire.kernels.kv_rows import SCALE_BYTES
from quire.kernels.triton.attention_kernel import attend, merge_parts
from quire.kernels.triton.attention_plan import AttentionPlan, DecodePlan, LayerKind
from quire.kernels.triton.kv_cache import KINDS

_LOG2_E = math.log2(math.e)
_PARTS_AT_ONCE = 8


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan | DecodePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.paged_attention`."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads, row_width = key_cache.shape[1:]
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    window = plan.seen_through(sliding_window)
    shared_by = num_heads // num_kv_heads
    kind = KINDS.get(key_cache.dtype, "float")
    layer = LayerKind(
        num_kv_heads, shared_by, head_dim, query.element_size(), kind != "float", window
    )
    key_scales, value_scales = key_cache, value_cache
    if kind != "float":
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
        key_scales, value_scales = key_cache, value_cache
        if head_dim % SCALE_BYTES == 0:
            key_scales, value_scales = (
                key_cache.view(torch.float32),
                value_cache.view(torch.float32),
            )
        if kind == "int8":
            key_cache, value_cache = key_cache.view(torch.int8), value_cache.view(torch.int8)
    factor = scale * _LOG2_E if softcap is None else 2 * scale * _LOG2_E / softcap
    for launch in plan.launches(layer):
        tiles, num_items, num_merges = launch.tiles, launch.items.shape[1], launch.merges.shape[1]
        num_shares = num_kv_heads * launch.shares
        num_rows = launch.num_parts * num_shares * launch.kept_rows
        # Of an alignment that is the same whatever there is.
        num_rows = (num_rows // 16 + 1) * 16
        parts = torch.empty(num_rows * (head_dim + 2), dtype=torch.float32, device=query.device)
        part_highest, part_total = parts[-2 * num_rows :], parts[-num_rows:]
        attend[(num_items * num_shares,)](
            query,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            query if alibi_slopes is None else alibi_slopes,
            out,
            parts,
            part_highest,
            part_total,
            plan.block_tables,
            launch.items,
            num_items,
            plan.block_tables.stride(0),
            query.stride(0),
            query.stride(1),
            key_cache.stride(0),
            factor,
            0.0 if softcap is None else softcap * _LOG2_E,
            window or 0,
            KIND=kind,
            FOLDS=kind == "float" and softcap is None and alibi_slopes is None and scale > 0,
            HAS_WINDOW=window is not None,
            HAS_CAP=softcap is not None,
            HAS_SLOPES=alibi_slopes is not None,
            BLOCK_SIZE=block_size,
            ROW_WIDTH=row_width,
            KV_HEADS=num_kv_heads,
            SHARED_BY=shared_by,
            HEADS=launch.heads,
            SHARES=launch.shares,
            KEPT_ROWS=launch.kept_rows,
            DIM=head_dim,
            WIDTH=layer.width,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if num_merges:
            merge_parts[(num_merges * num_shares * launch.kept_rows,)](
                out,
                parts,
                part_highest,
                part_total,
                launch.merges,
                num_merges,
                KV_HEADS=num_kv_heads,
                SHARED_BY=shared_by,
                HEADS=launch.heads,
                SHARES=launch.shares,
                KEPT_ROWS=launch.kept_rows,
                DIM=head_dim,
                WIDTH=layer.width,
                PARTS=_PARTS_AT_ONCE,
                num_warps=1 if layer.width <= 64 else 2,
            )
    return out
