"""Products with weights in codes, beside the one with the same weight in bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from quire.kernels.quantized import Kind, QuantizedWeight

if TYPE_CHECKING:
    from quire.bench.gpu.clock import Clock
    from quire.bench.gpu.kernel_speeds import Sizes
    from quire.bench.gpu.setting import Setting
    from quire.kernels import Backend

_GROUP = 128
_ROWS = (1, 32, 512)


def random_weight(
    kind: Kind, outputs: int, inputs: int, group: int, device: torch.device
) -> QuantizedWeight:
    """Return a weight of random codes, scales by outputs or, of int4, by groups."""
    if kind == "int4":
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    elif kind == "int8":
        codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, device=device)
    else:
        codes = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)
        group = inputs
    size = inputs if kind == "int8" else group
    scales = 0.001 * (0.5 + torch.rand(outputs, inputs // size, device=device))
    return QuantizedWeight(kind, codes, scales, inputs, size)


def quantized_products(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure few rows as bytes of weights, many as operations."""
    device, outputs, inputs = setting.device, 2 * sizes.inner, sizes.hidden
    kinds: tuple[Kind, ...] = ("int8", "int4", "fp8")
    group = min(_GROUP, inputs)
    coded = {kind: random_weight(kind, outputs, inputs, group, device) for kind in kinds}
    plain = torch.randn(outputs, inputs, device=device).to(setting.dtype)
    for rows in _ROWS:
        x = torch.randn(rows, inputs, device=device).to(setting.dtype)
        calls: dict[str, Callable[[], Any]] = {
            kind: lambda x=x, weight=weight: kernels.quantized_linear(x, weight)  # type: ignore[misc]
            for kind, weight in coded.items()
        }
        calls["bfloat16"] = lambda x=x: kernels.linear(x, plain)  # type: ignore[misc]
        times = clock.in_turns(calls, setting.seconds / 12)
        plain_time = statistics.median(times["bfloat16"])
        for kind, each in times.items():
            name = f"product {kind}, {rows} x {inputs} x {outputs}"
            note = f"{plain_time / statistics.median(each):.2f}x the speed of bfloat16"
            if kind == "bfloat16":
                note = ""
            num_bytes = coded[kind].num_bytes if kind in coded else plain.nbytes
            if rows < 64:
                num_bytes += rows * (inputs + outputs) * 2
                setting.report_bytes(name, each, num_bytes, note=note)
            else:
                setting.report_flops(name, each, 2 * rows * inputs * outputs, note=note)
