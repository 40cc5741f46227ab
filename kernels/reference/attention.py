"""Attention of a mixed batch over the paged KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels.reference.attention_plan import AttentionPlan
from quire.kernels.reference.decode_plan import DecodePlan
from quire.kernels.reference.sequence_group import SequenceGroup

_STACKED_QUERIES = 16
"""Up to so many query tokens, the query heads that share a KV head are stacked as the rows of
one product, which then reads each key once for all of them."""

_PAIRS_PER_TILE = 1 << 21
"""Scores, or elements of a mask, held at once."""


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
    if isinstance(plan, DecodePlan):
        out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        if plan.plan is not None:
            attended = paged_attention(
                query.index_select(0, plan.tokens),
                key_cache,
                value_cache,
                plan.plan,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
            )
            out.index_copy_(0, plan.tokens, attended)
        return out
    layout = plan.layout(sliding_window)
    num_tokens, num_heads, head_dim = query.shape
    # A slot is one row, so that it is copied whole.
    width = key_cache.shape[2] * key_cache.shape[3]
    keys, values = key_cache.view(-1, width), value_cache.view(-1, width)
    results = []
    for group, workspace in zip(
        layout.groups, layout.workspaces(key_cache, query.dtype, softcap is not None), strict=True
    ):
        workspace.gather(keys, values, group.slots)
        rows = query
        if isinstance(group.tokens, torch.Tensor):
            rows = query.index_select(0, group.tokens)
        elif group.num_tokens < num_tokens:
            rows = query[group.tokens]
        attended = _attend(
            rows.view(group.num_seqs, -1, num_heads, head_dim).to(workspace.key.dtype),
            workspace.key,
            workspace.value,
            group,
            scale,
            softcap,
            alibi_slopes,
        )
        results.append(attended.reshape(-1, num_heads, head_dim).to(query.dtype))
    together = results[0] if len(results) == 1 else torch.cat(results)
    return together if layout.order is None else together.index_select(0, layout.order)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: SequenceGroup,
    scale: float,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Attend from the queries of a group to its keys.

    Parameters
    ----------
    query : Tensor[num_seqs, max_query_len, num_heads, head_dim]
    key, value : Tensor[num_seqs, num_kv_heads, max_kv_len, head_dim]

    Returns
    -------
    Tensor[num_seqs, max_query_len, num_heads, head_dim]
    """
    num_heads = query.shape[2]
    is_plain = softcap is None and alibi_slopes is None
    if is_plain and group.is_causal:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=num_heads != key.shape[1],
        ).transpose(1, 2)
    parts = []
    for tile in group.tiles(_PAIRS_PER_TILE if is_plain else _PAIRS_PER_TILE // num_heads):
        if alibi_slopes is None:
            bias = group.mask(tile, query.dtype)
        else:
            bias = group.alibi_bias(tile, query.dtype, alibi_slopes)
        if tile.is_whole:
            part = _attend_tile(query, key, value, bias, scale, softcap)
        else:
            part = _attend_tile(
                query[:, tile.queries],
                key[:, :, tile.keys],
                value[:, :, tile.keys],
                bias,
                scale,
                softcap,
            )
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    num_seqs, query_len, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    shared_by = num_heads // num_kv_heads
    if softcap is not None:
        return _attend_capped(query, key, value, bias, scale, softcap)
    if query_len > _STACKED_QUERIES or shared_by == 1:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            attn_mask=bias,
            scale=scale,
            enable_gqa=shared_by > 1,
        ).transpose(1, 2)
    rows = query.transpose(1, 2).reshape(num_seqs, num_kv_heads, shared_by * query_len, head_dim)
    if bias is not None and bias.shape[1] > 1:
        bias = bias.reshape(num_seqs, num_kv_heads, shared_by * query_len, -1)
    elif bias is not None and query_len > 1:
        bias = bias.expand(-1, shared_by, -1, -1).reshape(num_seqs, 1, shared_by * query_len, -1)
    attended = F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    return attended.reshape(num_seqs, num_heads, query_len, head_dim).transpose(1, 2)


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    num_seqs, query_len, num_heads, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    shape = (num_kv_heads, num_seqs, num_heads // num_kv_heads, query_len)
    rows = query.view(num_seqs, query_len, num_kv_heads, -1, head_dim).permute(2, 0, 3, 1, 4)
    rows = rows.reshape(num_kv_heads, num_seqs, -1, head_dim)
    # One product per KV head: over several, torch would copy the keys to bring them in line.
    scores = rows.new_empty(num_kv_heads, num_seqs, rows.shape[2], kv_len)
    for head in range(num_kv_heads):
        torch.bmm(rows[head], key[:, head].transpose(1, 2), out=scores[head])
    scores = scores.float().mul_(scale / softcap).tanh_().mul_(softcap)
    if bias is not None:
        if bias.shape[1] > 1:
            bias = bias.view(num_seqs, num_kv_heads, -1, query_len, kv_len).transpose(0, 1)
        scores.view(*shape, kv_len).add_(bias)
    weights = scores.softmax(-1).to(value.dtype)
    attended = torch.empty_like(rows)
    for head in range(num_kv_heads):
        torch.bmm(weights[head], value[:, head], out=attended[head])
    attended = attended.view(*shape, head_dim).permute(1, 3, 0, 2, 4)
    return attended.reshape(num_seqs, query_len, num_heads, head_dim)
