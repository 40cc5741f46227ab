"""TritonBackend: what has a kernel by Triton, everything else by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from quire.kernels.interface import AttentionPlan
from quire.kernels.lora import Expand, LoraRows, Shrink
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
    mixes_without_waiting = True

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether `device` is a GPU and Triton can be imported."""
        return device.type in _DEVICES and why_missing() is None

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
