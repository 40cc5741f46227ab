"""Attention over the paged cache: of steps that generate, and of long prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from quire.bench.gpu.clock import Clock
    from quire.bench.gpu.kernel_speeds import Sizes
    from quire.bench.gpu.setting import Setting
    from quire.kernels import Backend

_BLOCK_SIZE = 16


def _cache(
    setting: Setting, kernels: Backend, sizes: Sizes, num_blocks: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return caches full of numbers, written as a step writes them."""
    caches = kernels.allocate_kv_cache(
        num_blocks, _BLOCK_SIZE, sizes.kv_heads, sizes.head_dim, dtype, setting.device
    )
    num_slots, step = num_blocks * _BLOCK_SIZE, 1 << 16
    for first in range(_BLOCK_SIZE, num_slots, step):
        slots = torch.arange(first, min(first + step, num_slots), device=setting.device)
        shape = (len(slots), sizes.kv_heads, sizes.head_dim)
        rows = torch.randn(shape, device=setting.device).to(setting.dtype)
        kernels.write_kv(rows, rows.flip(0), *caches, slots)
    return caches


def decode_attention(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure steps of one token for each sequence: all of the cache is read, once."""
    device = setting.device
    per_sequence = -(-sizes.context // _BLOCK_SIZE)
    num_blocks = 1 + sizes.sequences * per_sequence
    blocks = 1 + torch.randperm(num_blocks - 1)
    tables = blocks.view(sizes.sequences, per_sequence).int().to(device)
    starts = torch.arange(sizes.sequences + 1, dtype=torch.int32)
    lengths = torch.full((sizes.sequences,), sizes.context, dtype=torch.int32)
    shape = (sizes.sequences, sizes.heads, sizes.head_dim)
    query = torch.randn(shape, device=device).to(setting.dtype)
    for kept in (setting.dtype, torch.float8_e4m3fn, torch.int8):
        caches = _cache(setting, kernels, sizes, num_blocks, kept)
        plan = kernels.plan_attention(starts, lengths, tables, _BLOCK_SIZE)
        attend = partial(kernels.paged_attention, query, *caches, plan, scale=sizes.head_dim**-0.5)
        times = clock.times(attend, setting.seconds / 12)
        read = sum(each[1:].nbytes for each in caches)
        what = str(kept).removeprefix("torch.")
        setting.report_bytes(
            f"decode attention, {sizes.sequences} x {sizes.context} tokens, {what} cache",
            times,
            read + 2 * query.nbytes,
        )
        del caches, plan, attend


def prefill_attention(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure one long prompt, in turns with torch's flash attention over plain tensors."""
    device, length = setting.device, sizes.prompt
    num_blocks = 1 + -(-length // _BLOCK_SIZE)
    caches = _cache(setting, kernels, sizes, num_blocks, setting.dtype)
    tables = (1 + torch.randperm(num_blocks - 1)).int()[None].to(device)
    starts = torch.tensor([0, length], dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    plan = kernels.plan_attention(starts, lengths, tables, _BLOCK_SIZE)
    query = torch.randn(length, sizes.heads, sizes.head_dim, device=device).to(setting.dtype)
    scale = sizes.head_dim**-0.5
    plain_query = query.transpose(0, 1)[None]
    keys, values = (
        torch.randn(1, sizes.heads, length, sizes.head_dim, device=device).to(setting.dtype)
        for _ in range(2)
    )

    def flash() -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            plain_query, keys, values, is_causal=True, scale=scale
        )

    calls: dict[str, Callable[[], Any]] = {
        "quire": lambda: kernels.paged_attention(query, *caches, plan, scale=scale),
        "flash": _by_flash(setting, flash),
    }
    times = clock.in_turns(calls, setting.seconds / 8)
    flops = 4 * sizes.heads * sizes.head_dim * length * (length + 1) / 2
    name = f"prefill attention, {length} tokens, causal"
    medians = {side: sorted(each)[len(each) // 2] for side, each in times.items()}
    setting.report_flops(
        name,
        times["quire"],
        flops,
        ratio=medians["flash"] / medians["quire"],
        ratio_to="of torch's flash attention",
        note="over the paged cache; flash over contiguous keys, heads not shared",
    )
    setting.report_flops(f"torch's flash attention, {length} tokens, causal", times["flash"], flops)


def _by_flash(setting: Setting, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Have torch take its flash kernel, which else it may or may not; a CPU has no choice."""
    if setting.device.type == "cpu":
        return call
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def chosen() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    try:
        chosen()
    except RuntimeError:  # a device that has none
        return call
    return chosen
