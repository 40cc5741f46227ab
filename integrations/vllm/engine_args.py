"""EngineArgs: vLLM's engine arguments, and what quire makes of them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, make_dataclass
from functools import cache
from typing import Any
from uuid import uuid4

from quire.config.engine_config import argument_names, init_signature
from quire.errors import NotSupportedError
from quire.utils.checks import shown
from quire.utils.log import get_logger
from quire.utils.suggest import nearest, unexpected_argument

logger = get_logger(__name__)

WITHOUT_EFFECT = frozenset(
    # How vLLM compiles, captures, spreads and copies; how it logs; what its own kernels are; and
    # the details of what is refused by another name, such as of several nodes.
    [
        "aggregate_engine_logging",
        "all2all_backend",
        "allow_deprecated_quantization",
        "attention_config",
        "collect_detailed_traces",
        "cpu_distributed_timeout_seconds",
        "cudagraph_capture_sizes",
        "cudagraph_metrics",
        "custom_histogram_buckets",
        "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold",
        "disable_chunked_mm_input",
        "disable_hybrid_kv_cache_manager",
        "disable_log_requests",
        "disable_nccl_for_dp_synchronization",
        "distributed_timeout_seconds",
        "dp_sync_interval",
        "enable_batch_sharded_sampling",
        "enable_cumem_allocator",
        "enable_ep_weight_filter",
        "enable_flashinfer_autotune",
        "enable_layerwise_nvtx_tracing",
        "enable_log_requests",
        "enable_logging_iteration_details",
        "enable_mfu_metrics",
        "enable_mm_processor_stats",
        "enable_nccl_comm_suspend",
        "enable_shm_tensor_arena",
        "expert_placement_strategy",
        "fail_on_environ_validation",
        "gdn_prefill_backend",
        "interleave_mm_strings",
        "ir_op_priority",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "kda_decode_backend",
        "kda_prefill_backend",
        "kernel_config",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "kv_offloading_backend",
        "kv_sharing_fast_prefill",
        "linear_backend",
        "log_config_file",
        "log_level",
        "logging_config",
        "long_prefill_token_threshold_adaptive",
        "mamba_backend",
        "mamba_block_size",
        "mamba_cache_dtype",
        "mamba_cache_mode",
        "mamba_cache_philox_rounds",
        "mamba_config",
        "mamba_ssm_cache_dtype",
        "mamba_ssu_algorithm",
        "master_addr",
        "master_port",
        "max_cudagraph_capture_size",
        "media_io_kwargs",
        "mm_device_do_normalize",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_margin",
        "mm_encoder_fp8_scale_save_path",
        "mm_encoder_tp_mode",
        "mm_hasher_algorithm",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_processor_device",
        "mm_shm_cache_max_object_size_mb",
        "mm_tensor_ipc",
        "moe_backend",
        "monokernel",
        "numa_bind",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "optimization_level",
        "otlp_traces_endpoint",
        "per_request_spec_decode_metrics",
        "performance_mode",
        "prefill_schedule_interval",
        "prefix_cache_retention_interval",
        "prefix_match_unit",
        "pt_load_map_location",
        "ray_workers_use_nsight",
        "renderer_num_workers",
        "replayssm_buffer_len",
        "safetensors_load_strategy",
        "safetensors_prefetch_block_size",
        "safetensors_prefetch_num_threads",
        "scheduler_reserve_full_isl",
        "show_hidden_metrics_for_version",
        "shutdown_timeout",
        "skip_mm_profiling",
        "sleep_mode_backend",
        "sleep_mode_offload_cudagraph",
        "sparse_indexer_topk_backend",
        "specialize_active_lora",
        "stream_interval",
        "swa_bounded_replay",
        "use_fp64_gumbel",
        "use_tqdm_on_load",
        "video_pruning_method",
        "watchdog_config",
        "watermark",
    ]
)
"""Names that change nothing here, whatever their values."""

NOT_OFFERED = frozenset(
    [
        "aux_output_config",
        "cp_kv_cache_interleave_size",
        "cpu_offload_params",
        "data_parallel_address",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "data_parallel_multi_port_external_lb",
        "data_parallel_rank",
        "data_parallel_rpc_port",
        "data_parallel_size_local",
        "data_parallel_start_rank",
        "dcp_comm_backend",
        "dcp_kv_cache_interleave_size",
        "dcp_q_replicate",
        "default_mm_loras",
        "device_ids",
        "diffusion_config",
        "ec_manager_config",
        "ec_transfer_config",
        "elastic_ep_max_dp_size",
        "enable_dbo",
        "enable_elastic_ep",
        "enable_eplb",
        "enable_hc_sp",
        "enable_mamba_cache_stochastic_rounding",
        "enable_mamba_shared_prefix_checkpoint",
        "enable_mixed_moe_lora_format",
        "enable_mm_embeds",
        "enable_moe_shared_loras",
        "enable_return_routed_experts",
        "enable_tower_connector_lora",
        "enable_trace_replay",
        "engram_config",
        "eplb_config",
        "fault_tolerance_config",
        "enable_fault_tolerance",
        "io_processor_plugin",
        "kv_cache_dtype_skip_layers",
        "kv_offloading_size",
        "language_model_only",
        "lora_target_modules",
        "max_lora_cls_labels",
        "max_num_active_seqs",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_num_scheduled_tokens",
        "mm_encoder_only",
        "model_class_overrides",
        "model_weights",
        "nnodes",
        "node_rank",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "prefill_context_parallel_size",
        "reasoning_config",
        "reasoning_parser_plugin",
        "return_sampling_mask",
        "sleep_preserve_parameter_names",
        "spec_method",
        "spec_model",
        "spec_tokens",
        "tokens_only",
        "ubatch_size",
        "use_replayssm",
        "video_pruning_rate",
        "watermark_config",
        "weight_transfer_config",
    ]
)
"""Names that are taken where they ask for nothing, and refused where they ask for something."""

_NOTHING: tuple[Any, ...] = (None, False, 0, 1, 0.0, "", "auto", "none", {}, [], (), set())
_POOLING = ("embed", "classify", "score", "reward", "embedding", "pooling")


def as_quire(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :class:`quire.LLM` is to be told.

    Parameters
    ----------
    arguments : mapping
        vLLM's, by name.

    Raises
    ------
    TypeError
        A name that vLLM does not have; the message has the nearest one.
    NotSupportedError
        A value that asks for what is not offered.
    """
    known = frozenset(argument_names())
    told: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in TRANSLATED:
            told |= TRANSLATED[name](value)
        elif name in known:
            told[name] = value
        elif name in WITHOUT_EFFECT:
            if value is not None:
                logger.debug("%s=%s changes nothing here", name, shown(value))
        elif name in NOT_OFFERED:
            if not any(type(value) is type(each) and value == each for each in _NOTHING):
                raise NotSupportedError(
                    f"{name}={shown(value)} is an argument of vLLM's that quire does not offer; "
                    "leave it out"
                )
        else:
            raise unexpected_argument("LLM", name, known | WITHOUT_EFFECT | NOT_OFFERED)
    return told


def _structured_config(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    said = value if isinstance(value, Mapping) else vars(value)
    known = {"backend", "disable_any_whitespace", "disable_fallback", "reasoning_parser"}
    others = {name: each for name, each in said.items() if name not in known and each}
    if others or said.get("disable_any_whitespace") or said.get("reasoning_parser"):
        raise NotSupportedError(
            f"structured_outputs_config={shown(value)}: of its fields, quire takes 'backend'; give "
            "disable_any_whitespace with the StructuredOutputsParams of a request"
        )
    return _backend(said.get("backend"))


def _backend(value: Any) -> dict[str, Any]:
    # Names of libraries; vLLM's own choice, and one that is not here, are quire's choice.
    words = str(value or "auto").partition(":")[0]
    taken = {"guidance": "llguidance", "outlines": "outlines_core", "xgrammar": "xgrammar"}
    if words in ("auto", "lm-format-enforcer"):
        return {}
    if words not in taken:
        raise NotSupportedError(
            f"structured outputs by {words!r} are not offered; there are: auto, {', '.join(taken)}"
        )
    if words == "xgrammar":
        from importlib.util import find_spec

        if find_spec("xgrammar") is None:
            return {}
    return {"structured_outputs_backend": taken[words]}


def _runner(value: Any) -> dict[str, Any]:
    # Any model gives embeddings here, so there is nothing to be told.
    return {} if value in _POOLING else {"runner": value}


def _task(value: Any) -> dict[str, Any]:
    return {} if value in _POOLING else {"task": value}


def _convert(value: Any) -> dict[str, Any]:
    return {} if value in ("embed", "classify", "reward") else {"convert": value}


def _without(_: Any) -> dict[str, Any]:
    return {}


def _template(value: Any) -> dict[str, Any]:
    if value is not None and (isinstance(value, os.PathLike) or os.path.isfile(value)):
        with open(value, encoding="utf-8") as file:
            value = file.read()
    return {"chat_template": value}


TRANSLATED = {
    "chat_template": _template,
    "compilation_config": _without,
    "convert": _convert,
    "enable_sleep_mode": _without,
    "guided_decoding_backend": _backend,
    "profiler_config": _without,
    "runner": _runner,
    "served_model_name": _without,
    "structured_outputs_config": _structured_config,
    "task": _task,
}
"""Arguments that quire takes in another form."""


class _Fields:
    """What `dataclasses` finds: of a class every argument, of an object those that were given."""

    def __get__(self, args: EngineArgs | None, owner: type[EngineArgs]) -> Mapping[str, Any]:
        names = sorted(_names()) if args is None else list(vars(args))
        made = make_dataclass("_", [(name, Any, field(default=None)) for name in names])
        found: Mapping[str, Any] = vars(made)["__dataclass_fields__"]
        return found


def _names() -> frozenset[str]:
    return frozenset({"model", *argument_names(), *WITHOUT_EFFECT, *NOT_OFFERED, *TRANSLATED})


@cache
def defaults() -> dict[str, Any]:
    """Return what quire's engine arguments are where nothing is said, by name."""
    said = init_signature().parameters.values()
    return {
        each.name: each.default
        for each in said
        if each.kind is each.KEYWORD_ONLY and each.default is not MISSING
    }


class EngineArgs:
    """The arguments of an engine, by keyword; those that are left out have quire's defaults.

    Parameters
    ----------
    model : str or path
    **kwargs
        As of :class:`quire.integrations.vllm.llm.LLM`.

    As of a dataclass, ``dataclasses.asdict`` and ``vars`` are the arguments that were given, and
    they can be set as attributes.
    """

    __dataclass_fields__ = _Fields()

    def __init__(self, model: str | os.PathLike[str] = "quire/demo", **kwargs: Any) -> None:
        as_quire(kwargs)  # names and what is not offered are refused at once
        # As attributes, so that `vars` has what was given, and nothing else.
        self.__dict__.update(model=model, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _names():
            return defaults().get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model":
            as_quire({name: value})
        self.__dict__[name] = value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({said})"

    def arguments(self) -> dict[str, Any]:
        """Return what was given, by name."""
        return dict(vars(self))

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add a flag for each argument to a parser."""
        for name in sorted(_names() - {"model"}):
            flag = "--" + name.replace("_", "-")
            if flag in parser._option_string_actions:
                continue
            if _is_switch(name):
                # A switch takes no value, so that what follows it is the script's own.
                parser.add_argument(
                    flag,
                    dest=name,
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                )
                continue
            parser.add_argument(
                flag,
                dest=name,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                type=_value,
                metavar="VALUE",
            )
        if not any(action.dest == "model" for action in parser._actions):
            parser.add_argument("--model", default="quire/demo")
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Return the arguments that a parser found; others of the script's own are passed over."""
        names = _names()
        return cls(**{name: value for name, value in vars(args).items() if name in names})

    def create_model_config(self) -> Any:
        """Return what is known of the model before it is loaded."""
        from quire.integrations.vllm.model_config import ModelConfig

        return ModelConfig.read(vars(self))


class AsyncEngineArgs(EngineArgs):
    """The same, for :class:`quire.integrations.vllm.async_engine.AsyncLLM`."""


_SWITCHES = ("allow_", "async_", "disable_", "enable_", "fully_", "skip_", "use_", "return_")
_OTHER_SWITCHES = frozenset(
    [
        "aggregate_engine_logging",
        "cudagraph_metrics",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "enforce_eager",
        "interleave_mm_strings",
        "kv_cache_metrics",
        "kv_sharing_fast_prefill",
        "language_model_only",
        "mm_encoder_only",
        "numa_bind",
        "ray_workers_use_nsight",
        "scheduler_reserve_full_isl",
        "tokens_only",
        "trust_remote_code",
    ]
)


def _is_switch(name: str) -> bool:
    """Whether vLLM's flag for an argument takes no value."""
    return name.startswith(_SWITCHES) or name in _OTHER_SWITCHES


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser to which ``--max_model_len`` and ``--max-model-len`` are one flag."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, with hyphens in the flags' names."""
        import sys

        words = list(sys.argv[1:] if args is None else args)
        found = [word if not word.startswith("--") else _with_hyphens(word, self) for word in words]
        return super().parse_known_args(found, namespace)

    def error(self, message: str) -> Any:
        """Say what is wrong, and which flag may have been meant."""
        word = message.rpartition(" ")[2]
        near = nearest(word, self._option_string_actions) if word.startswith("--") else None
        super().error(message if near is None else f"{message}; did you mean {near}?")


def _with_hyphens(word: str, parser: argparse.ArgumentParser) -> str:
    name, equals, value = word.partition("=")
    if name in parser._option_string_actions:
        return word
    return name.replace("_", "-") + equals + value


def random_uuid() -> str:
    """Return an id that nobody else has."""
    return uuid4().hex
