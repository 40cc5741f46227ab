"""Arguments of vLLM that change nothing here, and those that this version does not offer."""

from __future__ import annotations

from typing import Any

from quire.config.checks import Check, anything, boolean, integer, not_offered, text

NO_EFFECT: dict[str, Check] = {
    # Nothing is compiled, and what graphs are recorded for follows from the other arguments.
    "compilation_config": anything,
    "max_seq_len_to_capture": integer(1),
    "disable_custom_all_reduce": boolean,
    "disable_cascade_attn": boolean,
    "disable_async_output_proc": boolean,
    "use_v2_block_manager": boolean,
    "max_context_len_to_capture": integer(1),
    # Prefix hits are verified by token ids, whatever the hash.
    "prefix_caching_hash_algo": text,
    # Counters are always kept; LLM.get_metrics() reads them.
    "disable_log_stats": boolean,
    # logprobs may ask for any number of tokens.
    "max_logprobs": integer(-1),
    # No code of a checkpoint runs, so its revision does not matter.
    "code_revision": text,
    "max_parallel_loading_workers": integer(1),
    # Keys and values in codes always have scales of their own.
    "calculate_kv_scales": boolean,
    # Biases of an adapter are always added.
    "enable_lora_bias": boolean,
}
"""Arguments that are checked and change nothing, each with its check."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "decode_context_parallel_size": (1,),
    "worker_cls": (None, "auto"),
    "worker_extension_cls": (None, ""),
    "cpu_offload_gb": (0, 0.0),
    "fully_sharded_loras": (False,),
    "enable_prompt_adapter": (False,),
    "speculative_config": (None,),
    "structured_outputs_config": (None,),
    "guided_decoding_backend": (None, "auto"),
    "reasoning_parser": (None, ""),
    "logprobs_mode": ("raw_logprobs",),
    "task": (None, "auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "pooler_config": (None,),
    "override_pooler_config": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "enable_prompt_embeds": (False,),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None, []),
    "limit_mm_per_prompt": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "model_loader_extra_config": (None, {}),
    "ignore_patterns": (None, []),
    "config_format": ("auto", "hf"),
    "hf_config_path": (None,),
    "model_impl": ("auto",),
    "served_model_name": (None,),
    "enable_sleep_mode": (False,),
    "disable_sliding_window": (False,),
    "max_num_partial_prefills": (1,),
    "max_long_partial_prefills": (1,),
    "long_prefill_token_threshold": (0,),
    "preemption_mode": (None, "recompute"),
    "scheduler_delay_factor": (0.0, 0),
    "num_scheduler_steps": (1,),
    "scheduler_cls": (None,),
    "kv_transfer_config": (None,),
    "kv_events_config": (None,),
    "profiler_config": (None,),
    "additional_config": (None, {}),
}
"""Arguments that this version does not offer, each with the values that ask for nothing."""


def check_off(name: str, value: Any) -> None:
    """Take a value of a name in :data:`NOT_OFFERED` that asks for nothing.

    Raises
    ------
    NotSupportedError
        For any other value.
    """
    off = NOT_OFFERED[name]
    # The types too: True is equal to 1, and is no size.
    if not any(type(value) is type(nothing) and value == nothing for nothing in off):
        raise not_offered(name, value, off[0])
