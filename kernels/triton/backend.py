"""TritonBackend: products with quantized weights by Triton, everything else by plain torch."""

from __future__ import annotations

from functools import cache

import torch

from quire.kernels.interface import AttentionPlan
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
    def write_kv(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `quire.kernels.interface.Backend.write_kv`."""
        from quire.kernels.triton.kv_cache import write_kv

        write_kv(key, value, key_cache, value_cache, slot_mapping)

    @staticmethod
    def plan_attention(
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> AttentionPlan:
        """See `quire.kernels.interface.Backend.plan_attention`."""
        from quire.kernels.triton.attention_plan import plan_attention

        return plan_attention(query_start_loc, seq_lens, block_tables, block_size)

    @staticmethod
    def make_decode_plan(
        num_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> AttentionPlan:
        """See `quire.kernels.interface.Backend.make_decode_plan`."""
        from quire.kernels.triton.attention_plan import DecodePlan

        return DecodePlan(num_seqs, max_blocks, block_size, device)

    @staticmethod
    def fill_decode_plan(
        plan: AttentionPlan, seq_lens: torch.Tensor, block_tables: torch.Tensor
    ) -> None:
        """See `quire.kernels.interface.Backend.fill_decode_plan`."""
        plan.fill(seq_lens, block_tables)

    @staticmethod
    def paged_attention(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `quire.kernels.interface.Backend.paged_attention`."""
        from quire.kernels.triton.attention import paged_attention

        return paged_attention(
            query,
            key_cache,
            value_cache,
            plan,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
