"""ReferenceBackend: the operations gathered under one name."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation import act_and_mul, activation
from quire.kernels.reference.attention import paged_attention
from quire.kernels.reference.attention_plan import plan_attention
from quire.kernels.reference.cache import allocate_kv_cache, write_kv
from quire.kernels.reference.decode_plan import fill_decode_plan, make_decode_plan
from quire.kernels.reference.embedding import embedding
from quire.kernels.reference.experts import mix_experts, mix_stacked_experts, route
from quire.kernels.reference.linear import linear
from quire.kernels.reference.lora import lora_expand, lora_shrink
from quire.kernels.reference.norm import add_rms_norm, layer_norm, rms_norm
from quire.kernels.reference.quantized import quantized_embedding, quantized_linear
from quire.kernels.reference.rotary import rotary_embedding
from quire.kernels.reference.sampling import (
    apply_bitmask,
    apply_penalties,
    argmax,
    gather_logprobs,
    log_softmax,
    sample_tokens,
    top_logits,
)


class ReferenceBackend:
    """Every operation in plain torch; a faster backend may inherit what it does not replace."""

    name = "reference"
    priority = 0

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether tensors on `device` can be worked on: any device that torch knows."""
        return True

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    layer_norm = staticmethod(layer_norm)
    rotary_embedding = staticmethod(rotary_embedding)
    activation = staticmethod(activation)
    act_and_mul = staticmethod(act_and_mul)
    linear = staticmethod(linear)
    embedding = staticmethod(embedding)
    quantized_linear = staticmethod(quantized_linear)
    quantized_embedding = staticmethod(quantized_embedding)
    route = staticmethod(route)
    mix_experts = staticmethod(mix_experts)
    mix_stacked_experts = staticmethod(mix_stacked_experts)
    lora_shrink = staticmethod(lora_shrink)
    lora_expand = staticmethod(lora_expand)
    allocate_kv_cache = staticmethod(allocate_kv_cache)
    write_kv = staticmethod(write_kv)
    plan_attention = staticmethod(plan_attention)
    make_decode_plan = staticmethod(make_decode_plan)
    fill_decode_plan = staticmethod(fill_decode_plan)
    paged_attention = staticmethod(paged_attention)
    argmax = staticmethod(argmax)
    log_softmax = staticmethod(log_softmax)
    apply_penalties = staticmethod(apply_penalties)
    apply_bitmask = staticmethod(apply_bitmask)
    top_logits = staticmethod(top_logits)
    gather_logprobs = staticmethod(gather_logprobs)
    sample_tokens = staticmethod(sample_tokens)
