"""From logits to tokens: how fast logits are gone over."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from quire.bench.gpu.clock import Clock
    from quire.bench.gpu.kernel_speeds import Sizes
    from quire.bench.gpu.setting import Setting
    from quire.kernels import Backend

_ROWS = 256


def limits_for(kernels: Backend, device: torch.device, **columns: torch.Tensor) -> dict[str, Any]:
    """Return the limits of `sample_tokens` as a backend takes them: as tensors, or on the host."""
    parameters = inspect.signature(kernels.sample_tokens).parameters
    if "Tensor" in str(parameters["temperature"].annotation):
        return {name: column.to(device) for name, column in columns.items()}
    return {name: column.numpy() for name, column in columns.items()}


def sampling(setting: Setting, clock: Clock, kernels: Backend, sizes: Sizes) -> None:
    """Measure the likeliest token, draws, and log-probabilities, of many rows."""
    rows = 4 if setting.tiny else _ROWS
    logits = torch.randn(rows, sizes.vocab_size, device=setting.device) * 3
    ids = logits.argmax(1)

    def columns(top_k: int, top_p: float, min_p: float) -> dict[str, Any]:
        kind = torch.float64
        return limits_for(
            kernels,
            setting.device,
            temperature=torch.full((rows,), 0.8, dtype=kind),
            top_k=torch.full((rows,), top_k),
            top_p=torch.full((rows,), top_p, dtype=kind),
            min_p=torch.full((rows,), min_p, dtype=kind),
            uniform=torch.rand(rows, dtype=kind),
        )

    plain, top_p, top_k, min_p = (
        columns(*each) for each in ((0, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.0), (0, 1.0, 0.05))
    )
    calls: dict[str, Callable[[], Any]] = {
        "argmax": lambda: kernels.argmax(logits),
        "sample_tokens": lambda: kernels.sample_tokens(logits, **plain),
        "sample_tokens, top_p 0.9": lambda: kernels.sample_tokens(logits, **top_p),
        "sample_tokens, top_k 50 and top_p 0.9": lambda: kernels.sample_tokens(logits, **top_k),
        "sample_tokens, min_p 0.05": lambda: kernels.sample_tokens(logits, **min_p),
        "gather_logprobs, 5": lambda: kernels.gather_logprobs(logits, ids, 5),
    }
    for name, call in calls.items():
        if setting.left < 0:
            return
        times = clock.times(call, setting.seconds / 60)
        setting.report_bytes(
            f"{name}, {rows} x {sizes.vocab_size}",
            times,
            logits.nbytes,
            note="as if logits were read once",
        )
