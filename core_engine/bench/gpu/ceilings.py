"""What the device can do at all: copy, and multiply large matrices."""

from __future__ import annotations

import torch

from quire.bench.gpu.clock import Clock
from quire.bench.gpu.setting import Setting

COPY = "copy"
PRODUCT = "bf16 product"


def measure(setting: Setting) -> None:
    """Measure what everything else is a share of."""
    clock = Clock(setting.device)
    size = 8 << 20 if setting.tiny else 2 << 30
    _copy(setting, clock, size)
    width = 128 if setting.tiny else 8192
    a, b = (torch.randn(width, width, device=setting.device).to(setting.dtype) for _ in range(2))
    times = clock.times(lambda: a @ b, setting.seconds / 4)
    setting.report_flops(PRODUCT, times, 2 * width**3, note=f"{width} x {width} x {width}")


def _copy(setting: Setting, clock: Clock, size: int) -> None:
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    times = clock.times(lambda: target.copy_(source), setting.seconds / 4)
    setting.report_bytes(COPY, times, 2 * size, note=f"{size / 2**30:g} GiB, read and written")
