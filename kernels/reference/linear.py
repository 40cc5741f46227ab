"""Matrix product with a weight, of types that a CPU may have no instructions for.

Without such instructions torch multiplies bfloat16 and float16 matrices at about a sixth of
the speed of float32. So there the weight is widened to float32 panel by panel, in a buffer that
stays in the cache, and each panel is multiplied in float32: the weight is still read once, and
nothing of it is kept. A few rows are limited by reading the weight, and torch's own product
of a matrix and a vector does that best.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F

_LEAST_ROWS = 4
_LEAST_PRODUCTS = 1 << 18
"""Multiplications below which the calls for panels take longer than torch's own product."""

_PANEL_SIZE = 1 << 20
"""Elements of a weight widened at once: 4 MiB."""

_MOST_ROWS_ON_THE_RIGHT = 256
"""Up to so many rows, float32 products are faster with the panel as the left factor."""

_scratch = threading.local()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.linear`."""
    if (
        x.dtype is torch.float32
        or x.shape[0] < _LEAST_ROWS
        or x.shape[0] * weight.numel() < _LEAST_PRODUCTS
        or x.device.type != "cpu"
        or _is_native(x.dtype)
    ):
        return F.linear(x, weight, bias)
    return _linear_by_panels(x, weight, bias)


@cache
def _is_native(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this type by instructions of its own."""
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def _linear_by_panels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    height = min(out_features, max(16, _PANEL_SIZE // in_features))
    panel = _buffer("panel", height * in_features).view(height, in_features)
    product = _buffer("product", height * num_rows)
    wide = x.float()
    result = torch.empty(num_rows, out_features, dtype=x.dtype)
    for start in range(0, out_features, height):
        stop = min(start + height, out_features)
        factor = panel[: stop - start].copy_(weight[start:stop])
        part = product[: (stop - start) * num_rows]
        if num_rows <= _MOST_ROWS_ON_THE_RIGHT:
            part = torch.mm(factor, wide.t(), out=part.view(-1, num_rows)).t()
        else:
            part = torch.mm(wide, factor.t(), out=part.view(num_rows, -1))
        if bias is not None:
            part.add_(bias[start:stop])
        result[:, start:stop] = part
    return result


def _buffer(name: str, size: int) -> torch.Tensor:
    """Return a float32 buffer of this thread, `[size]`; its content is anything."""
    buffer: torch.Tensor | None = getattr(_scratch, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.float32)
        setattr(_scratch, name, buffer)
    return buffer[:size]
