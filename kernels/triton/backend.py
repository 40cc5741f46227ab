"""TritonBackend: products with quantized weights by Triton, everything else by plain torch."""

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
    def quantized_linear(
        x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
        from quire.kernels.triton.quantized import quantized_linear

        return quantized_linear(x, weight, bias)

    @staticmethod
    def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.argmax`."""
        from quire.kernels.triton.sampling import argmax

        return argmax(logits)

    @staticmethod
    def log_softmax(logits: torch.Tensor) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.log_softmax`."""
        from quire.kernels.triton.sampling import log_softmax

        return log_softmax(logits)

    @staticmethod
    def apply_penalties(
        logits: torch.Tensor,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        counts: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
        repetition: torch.Tensor,
    ) -> None:
        """See `quire.kernels.interface.Backend.apply_penalties`."""
        from quire.kernels.triton.sampling import apply_penalties

        apply_penalties(logits, rows, token_ids, counts, presence, frequency, repetition)

    @staticmethod
    def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
        """See `quire.kernels.interface.Backend.apply_bitmask`."""
        from quire.kernels.triton.sampling import apply_bitmask

        apply_bitmask(logits, rows, bitmask)

    @staticmethod
    def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.top_logits`."""
        from quire.kernels.triton.sampling import top_logits

        return top_logits(logits, k)

    @staticmethod
    def gather_logprobs(
        logits: torch.Tensor, token_ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `quire.kernels.interface.Backend.gather_logprobs`."""
        from quire.kernels.triton.sampling import gather_logprobs

        return gather_logprobs(logits, token_ids, k)

    @staticmethod
    def sample_tokens(
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.sample_tokens`."""
        from quire.kernels.triton.sampling import sample_tokens

        return sample_tokens(logits, temperature, top_k, top_p, min_p, uniform)
