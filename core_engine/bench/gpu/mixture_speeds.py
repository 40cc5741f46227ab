"""LoRA adapters in one batch, and mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.kernels.lora import Expand, ExpandSlice, LoraRows, Shrink

if TYPE_CHECKING:
    from quire.bench.gpu.clock import Clock
    from quire.bench.gpu.kernel_speeds import Sizes
    from quire.bench.gpu.setting import Setting
    from quire.kernels import Backend

_RANK = 16
_ADAPTERS = 8
_EXPERTS = 8
_PER_TOKEN = 2


def adapters(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure what adapters add to one projection, each of a few for a share of the rows."""
    device, dtype, width = setting.device, setting.dtype, sizes.hidden

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    shrinks = [
        Shrink(noise(_RANK, width), torch.ones(_RANK, device=device)) for _ in range(_ADAPTERS)
    ]
    expands = [
        Expand((ExpandSlice(0, 0, noise(width, _RANK)),), None, None) for _ in range(_ADAPTERS)
    ]
    for count in (32, sizes.rows):
        slots = torch.arange(count, dtype=torch.int32) % _ADAPTERS
        rows = LoraRows.of(slots, device)
        assert rows is not None
        x, y = noise(count, width), noise(count, width)

        def both(x: torch.Tensor = x, y: torch.Tensor = y, rows: LoraRows = rows) -> None:
            kernels.lora_expand(y, kernels.lora_shrink(x, shrinks, rows), expands, rows)

        times = clock.times(both, setting.seconds / 30)
        read = 2 * _ADAPTERS * _RANK * width * dtype.itemsize + 3 * x.nbytes
        setting.report_bytes(
            f"LoRA, {count} rows, {_ADAPTERS} adapters of rank {_RANK}", times, read
        )


def experts(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure a layer of eight experts, of which each row has two."""
    device, dtype, width, inner = setting.device, setting.dtype, sizes.hidden, sizes.inner

    def noise(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, device=device)).to(dtype)

    gate_up, down = noise(_EXPERTS, 2 * inner, width), noise(_EXPERTS, width, inner)
    stacked = getattr(kernels, "mix_stacked_experts", None)
    functions = [
        lambda x, i=i: kernels.linear(
            kernels.act_and_mul(kernels.linear(x, gate_up[i]), "silu"), down[i]
        )
        for i in range(_EXPERTS)
    ]
    note = "one by one: waits for the device" if stacked is None else "all at once"
    for count in (1, 32, sizes.rows):
        x = noise(count, width)
        logits = torch.randn(count, _EXPERTS, device=device)

        def mixed(x: torch.Tensor = x, logits: torch.Tensor = logits) -> None:
            weights, chosen = kernels.route(logits, _PER_TOKEN, normalized=True)
            if stacked is not None:
                stacked(x, weights, chosen, gate_up, down, "silu")
            else:
                kernels.mix_experts(x, weights, chosen, functions)

        times = clock.times(mixed, setting.seconds / 30)
        name = f"experts, {count} rows, {_PER_TOKEN} of {_EXPERTS}"
        used = len(set(logits.topk(_PER_TOKEN).indices.flatten().tolist()))
        if count < 64:
            read = used * 3 * inner * width * dtype.itemsize
            setting.report_bytes(name, times, read, note=note)
        else:
            flops = count * _PER_TOKEN * 6 * inner * width
            setting.report_flops(name, times, flops, note=note)
