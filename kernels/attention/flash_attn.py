"""Attention by the package flash-attn (Dao, arXiv:2307.08691), where it is installed.

Written after its documented interface, and compared with a stand-in that computes what is
documented: it has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from quire.kernels.attention.needs import AttentionNeeds
from quire.kernels.attention.uploads import on_device

_BLOCK = 256
"""Blocks of a paged cache are multiples of so many tokens there."""
_LARGEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Plan:
    """What the layers of a step share.

    Attributes
    ----------
    starts : Tensor[num_seqs + 1], int32, or None
        Where each sequence's queries begin; None where it has one each.
    key_starts : Tensor[num_seqs + 1], int32, or None
        The same of its keys, were they laid end to end.
    seq_lens : Tensor[num_seqs], int32
    block_tables : Tensor[num_seqs, max_blocks], int32
    longest_query, longest : int
        Tokens of the step, and of the whole, of the sequence that has most.
    """

    starts: torch.Tensor | None
    key_starts: torch.Tensor | None
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    longest_query: int = 1
    longest: int = 0


def plan_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> Plan:
    """See `quire.kernels.interface.Backend.plan_attention`."""
    device = block_tables.device
    starts, lens = query_start_loc.numpy(), seq_lens.numpy()
    longest_query = int(np.diff(starts).max())
    plan = Plan(None, None, on_device(lens, device), block_tables, longest_query, int(lens.max()))
    if longest_query > 1:
        plan.starts = on_device(starts, device)
        plan.key_starts = on_device(np.concatenate(([0], np.cumsum(lens))), device)
    return plan


def make_decode_plan(num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> Plan:
    """See `quire.engine.graphs.DecodeBackend.make_decode_plan`."""
    return Plan(
        None,
        None,
        torch.zeros(num_seqs, dtype=torch.int32, device=device),
        torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=device),
    )


def fill_decode_plan(plan: Plan, seq_lens: torch.Tensor, block_tables: torch.Tensor) -> None:
    """See `quire.engine.graphs.DecodeBackend.fill_decode_plan`."""
    count, width = block_tables.shape
    lens = np.zeros(len(plan.seq_lens), dtype=np.int32)
    lens[:count] = seq_lens.numpy()
    plan.seq_lens.copy_(on_device(lens, plan.seq_lens.device))
    plan.block_tables[:count, :width].copy_(block_tables)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.paged_attention`."""
    package = import_module("flash_attn")
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        # How many keys before a token's own it sees; -1 is all.
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": softcap or 0.0,
        "alibi_slopes": alibi_slopes,
        "block_table": plan.block_tables,
    }
    result: torch.Tensor
    if plan.starts is None:
        result = package.flash_attn_with_kvcache(
            query.unsqueeze(1), key_cache, value_cache, cache_seqlens=plan.seq_lens, **options
        ).squeeze(1)
        return result
    result = package.flash_attn_varlen_func(
        query,
        key_cache,
        value_cache,
        plan.starts,
        plan.key_starts,
        plan.longest_query,
        plan.longest,
        **options,
    )
    return result


class FlashAttention:
    """Attention by ``flash_attn``, 2.6 or later."""

    name = "FLASH_ATTN"

    @staticmethod
    def why_missing(device: torch.device) -> str | None:
        """See `Attention.why_missing`."""
        if device.type != "cuda":
            return f"it is for devices of type 'cuda', and not for {device.type!r}"
        try:
            package = import_module("flash_attn")
        except ImportError as error:
            return f"flash_attn cannot be imported ({error}): pip install flash-attn"
        if not hasattr(package, "flash_attn_with_kvcache"):
            return "this flash_attn has no flash_attn_with_kvcache: install 2.6 or later"
        return None

    @staticmethod
    def why_unfit(needs: AttentionNeeds) -> str | None:
        """See `Attention.why_unfit`."""
        if needs.dtype not in _DTYPES:
            return "it computes in float16 and bfloat16: set dtype to one of them"
        if needs.cache_dtype is not needs.dtype:
            return "keys and values are to be of the model's own type: set kv_cache_dtype='auto'"
        if needs.block_size % _BLOCK:
            return f"its blocks are multiples of {_BLOCK} tokens: set block_size={_BLOCK}"
        for layer in needs.layers:
            if layer.head_dim % 8 or layer.head_dim > _LARGEST_HEAD:
                return (
                    f"heads have {layer.head_dim} dimensions, and it takes multiples of 8 up to "
                    f"{_LARGEST_HEAD}"
                )
        return None

    @staticmethod
    def operations(device: torch.device) -> Mapping[str, Callable[..., Any]]:
        """See `Attention.operations`."""
        return {
            "plan_attention": plan_attention,
            "paged_attention": paged_attention,
            "make_decode_plan": make_decode_plan,
            "fill_decode_plan": fill_decode_plan,
        }
