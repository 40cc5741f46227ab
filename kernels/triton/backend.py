"""TritonBackend: products with quantized weights by Triton, everything else by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from quire.kernels.lora import Expand, LoraRows, Shrink
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
    mixes_without_waiting = True

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether `device` is a GPU and Triton can be imported."""
        return device.type == "cuda" and why_missing() is None

    @staticmethod
    def quantized_linear(
        x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
        from quire.kernels.triton.quantized import quantized_linear

        return quantized_linear(x, weight, bias)

    @staticmethod
    def route(
        logits: torch.Tensor, per_token: int, *, normalized: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.experts_interface.ExpertOperations.route`."""
        from quire.kernels.triton.experts import route

        return route(logits, per_token, normalized=normalized)

    @staticmethod
    def mix_stacked_experts(
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        kind: str,
        *,
        first_expert: int = 0,
    ) -> torch.Tensor:
        """See `quire.kernels.experts_interface.ExpertOperations.mix_stacked_experts`."""
        from quire.kernels.triton.experts import mix_stacked_experts

        return mix_stacked_experts(
            x, weights, chosen, gate_up, down, kind, first_expert=first_expert
        )

    @staticmethod
    def lora_shrink(
        x: torch.Tensor, adapters: Sequence[Shrink | None], rows: LoraRows
    ) -> torch.Tensor:
        """See `quire.kernels.lora_interface.LoraOperations.lora_shrink`."""
        from quire.kernels.triton.lora import lora_shrink

        return lora_shrink(x, adapters, rows)

    @staticmethod
    def lora_expand(
        y: torch.Tensor,
        shrunk: torch.Tensor,
        adapters: Sequence[Expand | None],
        rows: LoraRows,
    ) -> None:
        """See `quire.kernels.lora_interface.LoraOperations.lora_expand`."""
        from quire.kernels.triton.lora import lora_expand

        lora_expand(y, shrunk, adapters, rows)
