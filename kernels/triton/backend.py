"""TritonBackend: what has a kernel by Triton, everything else by plain torch."""

from __future__ import annotations

from functools import cache

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend


@cache
def why_missing() -> str | None:
    """Return why Triton's kernels cannot run here; None if they can."""
    # Triton is asked last: its import takes longer than all else.
    if not torch.cuda.is_available():
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
        return device.type == "cuda" and why_missing() is None

    @staticmethod
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, weight_offset: float = 0.0
    ) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.rms_norm`."""
        from quire.kernels.triton.norms import rms_norm

        return rms_norm(x, weight, eps, weight_offset=weight_offset)

    @staticmethod
    def add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        weight_offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.add_rms_norm`."""
        from quire.kernels.triton.norms import add_rms_norm

        return add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset)

    @staticmethod
    def layer_norm(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.layer_norm`."""
        from quire.kernels.triton.norms import layer_norm

        return layer_norm(x, weight, bias, eps)

    @staticmethod
    def rotary_embedding(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.rotary_embedding`."""
        from quire.kernels.triton.rotary import rotary_embedding

        return rotary_embedding(query, key, cos, sin, interleaved=interleaved)

    @staticmethod
    def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.activation`."""
        from quire.kernels.triton.activation import activation

        return activation(x, kind)

    @staticmethod
    def act_and_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.act_and_mul`."""
        from quire.kernels.triton.activation import act_and_mul

        return act_and_mul(x, kind)

    @staticmethod
    def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.embedding`."""
        from quire.kernels.triton.embedding import embedding

        return embedding(ids, weight)

    @staticmethod
    def quantized_linear(
        x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
        from quire.kernels.triton.quantized import quantized_linear

        return quantized_linear(x, weight, bias)

    @staticmethod
    def quantized_embedding(
        ids: torch.Tensor, weight: QuantizedWeight, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_embedding`."""
        from quire.kernels.triton.quantized_embedding import quantized_embedding

        return quantized_embedding(ids, weight, dtype)
