"""EngineArguments: the keyword arguments of LLM and AsyncLLM, for editors and type checkers.

What they mean, their defaults and their checks are in :mod:`quire.config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from quire.logits_processor import LogitsProcessor
from quire.lora_request import LoRARequest

if TYPE_CHECKING:
    import torch

Path = str | PathLike[str]

LoRAModules = Mapping[str, Path] | Sequence[str | Mapping[str, Any] | LoRARequest]
"""Adapters to begin with: by name; or ``"name=path"``, dicts and LoRARequest objects in a list."""


class EngineArguments(TypedDict, total=False):
    """Every argument beside ``model``; None is the default of any of them."""

    tokenizer: Path | None
    tokenizer_mode: str | None
    skip_tokenizer_init: bool | None
    trust_remote_code: bool | None
    dtype: str | torch.dtype | None
    quantization: str | None
    quantization_config: Mapping[str, Any] | None
    load_format: str | None
    revision: str | None
    tokenizer_revision: str | None
    max_model_len: int | None
    download_dir: Path | None
    hf_token: str | bool | None
    hf_overrides: Mapping[str, Any] | None
    generation_config: Path | None
    override_generation_config: Mapping[str, Any] | None
    chat_template: str | None
    block_size: int | None
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    kv_cache_dtype: str | torch.dtype | None
    enable_prefix_caching: bool | None
    gpu_memory_utilization: float | None
    swap_space: float | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    enable_chunked_prefill: bool | None
    scheduling_policy: Literal["fcfs", "priority"] | None
    max_waiting_requests: int | None
    async_scheduling: bool | None
    structured_outputs_backend: Literal["llguidance", "outlines_core", "xgrammar"] | None
    structured_outputs_deadline: float | None
    structured_outputs_forced_tokens: bool | None
    enable_lora: bool | None
    max_loras: int | None
    max_lora_rank: int | None
    max_cpu_loras: int | None
    lora_dtype: str | torch.dtype | None
    lora_modules: LoRAModules | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int | None
    data_parallel_size: int | None
    data_parallel_backend: str | None
    enable_expert_parallel: bool | None
    distributed_executor_backend: str | None
    seed: int | None
    device: str | torch.device | None
    batch_invariant: bool | None
    attention_backend: str | None
    enforce_eager: bool | None
    logits_processors: Sequence[LogitsProcessor | type[LogitsProcessor]] | None
    # Checked, without effect.
    compilation_config: Any
    max_seq_len_to_capture: int | None
    disable_custom_all_reduce: bool | None
    disable_cascade_attn: bool | None
    prefix_caching_hash_algo: str | None
    disable_log_stats: bool | None
    max_logprobs: int | None
    code_revision: str | None
    max_parallel_loading_workers: int | None
    enable_lora_bias: bool | None
    calculate_kv_scales: bool | None
    disable_async_output_proc: bool | None
    use_v2_block_manager: bool | None
    max_context_len_to_capture: int | None
    # Not offered by this version beyond the values that ask for nothing.
    decode_context_parallel_size: int | None
    worker_cls: str | None
    worker_extension_cls: str | None
    cpu_offload_gb: float | None
    fully_sharded_loras: bool | None
    speculative_config: Any
    structured_outputs_config: Any
    guided_decoding_backend: str | None
    reasoning_parser: str | None
    logprobs_mode: str | None
    task: str | None
    runner: str | None
    convert: str | None
    pooler_config: Any
    enable_prompt_embeds: bool | None
    allowed_local_media_path: str | None
    allowed_media_domains: Any
    limit_mm_per_prompt: Any
    mm_processor_kwargs: Any
    model_loader_extra_config: Any
    ignore_patterns: Any
    config_format: str | None
    hf_config_path: Any
    model_impl: str | None
    served_model_name: Any
    enable_sleep_mode: bool | None
    disable_sliding_window: bool | None
    max_num_partial_prefills: int | None
    max_long_partial_prefills: int | None
    long_prefill_token_threshold: int | None
    preemption_mode: str | None
    scheduler_cls: Any
    kv_transfer_config: Any
    kv_events_config: Any
    profiler_config: Any
    additional_config: Any
    enable_prompt_adapter: bool | None
    override_pooler_config: Any
    rope_scaling: Any
    rope_theta: Any
    scheduler_delay_factor: float | None
    num_scheduler_steps: int | None
