"""Attention by the package flashinfer (Ye et al., arXiv:2501.01005), where it is installed.

Written after its documented interface, and compared with a stand-in that computes what is
documented: it has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quire.kernels.attention.needs import AttentionNeeds
from quire.kernels.attention.uploads import on_device, on_host

_WORKSPACE_BYTES = 128 << 20  # what its manual recommends
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)


class _Kind(NamedTuple):
    """What a layer's attention is planned by."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype


class Wrappers:
    """The package's wrappers, which plan a step for layers of one kind and then run each of them.

    Of each kind there are two by turns: one that is planned must not be the one whose plan is
    still on its way to the device. All of them compute in one workspace, one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace: torch.Tensor | None = None
        self._turns: dict[_Kind, Any] = {}

    def next(self, kind: _Kind) -> Any:
        """Return the wrapper of layers of a kind whose turn it is."""
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        if kind not in self._turns:
            make = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
            self._turns[kind] = cycle([make(self._workspace, "NHD") for _ in range(2)])
        return next(self._turns[kind])


class Plan:
    """What the layers of a step share: one wrapper for each kind of them.

    Parameters
    ----------
    starts, seq_lens : ndarray
        On the host, where the package plans.
    block_tables : Tensor[num_seqs, max_blocks], int32
    block_size : int
    wrappers : Wrappers
    """

    def __init__(
        self,
        starts: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_tables: torch.Tensor,
        block_size: int,
        wrappers: Wrappers,
    ) -> None:
        device = block_tables.device
        counts = -(-seq_lens.astype(np.int64) // block_size)
        ends = np.cumsum(counts)
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        flat = on_device(rows * block_tables.shape[1] + places, device)
        self._pages = block_tables.flatten().index_select(0, flat)
        self._starts = on_host(starts, device)
        self._page_starts = on_host(np.concatenate(([0], ends)), device)
        self._last_pages = on_host(seq_lens - (counts - 1) * block_size, device)
        self._block_size = block_size
        self._wrappers = wrappers
        self._planned: dict[_Kind, Any] = {}

    def wrapper(self, kind: _Kind) -> Any:
        """Return what layers of a kind are run by."""
        wrapper = self._planned.get(kind)
        if wrapper is None:
            wrapper = self._planned[kind] = self._wrappers.next(kind)
            wrapper.plan(
                self._starts,
                self._page_starts,
                self._pages,
                self._last_pages,
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self._block_size,
                causal=True,
                sm_scale=kind.scale,
                # How many keys before a token's own it sees; -1 is all.
                window_left=-1 if kind.window is None else kind.window - 1,
                logits_soft_cap=kind.softcap,
                q_data_type=kind.dtype,
                kv_data_type=kind.dtype,
            )
        return wrapper


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
    """See `quire.kernels.interface.Backend.paged_attention`; without ALiBi."""
    if alibi_slopes is not None:
        raise ValueError("FLASHINFER has no ALiBi of given slopes")
    num_heads, head_dim = query.shape[1:]
    kind = _Kind(
        num_heads, key_cache.shape[2], head_dim, scale, sliding_window, softcap, query.dtype
    )
    result: torch.Tensor = plan.wrapper(kind).run(query.contiguous(), (key_cache, value_cache))
    return result


class FlashInfer:
    """Attention by ``flashinfer``, 0.2 or later."""

    name = "FLASHINFER"

    @staticmethod
    def why_missing(device: torch.device) -> str | None:
        """See `Attention.why_missing`."""
        if device.type != "cuda":
            return f"it is for devices of type 'cuda', and not for {device.type!r}"
        try:
            package = import_module("flashinfer")
        except ImportError as error:
            return f"flashinfer cannot be imported ({error}): pip install flashinfer-python"
        if not hasattr(package, "BatchPrefillWithPagedKVCacheWrapper"):
            return "this flashinfer has no BatchPrefillWithPagedKVCacheWrapper: install another"
        return None

    @staticmethod
    def why_unfit(needs: AttentionNeeds) -> str | None:
        """See `Attention.why_unfit`."""
        if needs.dtype not in _DTYPES:
            return "it computes in float16 and bfloat16: set dtype to one of them"
        if needs.cache_dtype is not needs.dtype:
            return "keys and values are to be of the model's own type: set kv_cache_dtype='auto'"
        for layer in needs.layers:
            if layer.has_alibi:
                return "it has slopes of its own for ALiBi, which are not the model's"
            if layer.head_dim not in _HEAD_DIMS:
                return f"heads have {layer.head_dim} dimensions, and it takes 64, 128 and 256"
        return None

    @staticmethod
    def operations(device: torch.device) -> Mapping[str, Callable[..., Any]]:
        """See `Attention.operations`."""
        wrappers = Wrappers(device)

        def plan_attention(
            query_start_loc: torch.Tensor,
            seq_lens: torch.Tensor,
            block_tables: torch.Tensor,
            block_size: int,
        ) -> Plan:
            starts, lens = query_start_loc.numpy(), seq_lens.numpy()
            return Plan(starts, lens, block_tables, block_size, wrappers)

        return {"plan_attention": plan_attention, "paged_attention": paged_attention}
