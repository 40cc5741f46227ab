"""TritonBackend: products with quantized weights by Triton, everything else by plain torch."""

from __future__ import annotations

from functools import cache

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend

_DEVICES = ("cuda", "xpu")
"""Types of devices that Triton compiles for: NVIDIA's and AMD's GPUs, and Intel's."""


@cache
def why_missing() -> str | None:
    """Return why Triton's kernels cannot run here; None if they can."""
    # Triton is asked last: its import takes longer than all else.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type not in _DEVICES:
        return "torch finds no GPU"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'quire[gpu]'"
    return None


class TritonBackend(ReferenceBackend):
    """For GPUs, where Triton is installed.

    An operation that has a kernel of its own replaces the reference's here, and looks itself
    whether it takes what it is given. Kernels are imported when they are first called: that takes
    a compiler's time.
    """

    name = "triton"
    priority = 10

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether `device` is a GPU and Triton can be imported."""
        return device.type in _DEVICES and why_missing() is None

    @staticmethod
    def quantized_linear(
        x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
        from quire.kernels.triton.quantized import quantized_linear

        return quantized_linear(x, weight, bias)
