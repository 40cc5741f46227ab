"""EngineConfig: what an engine is made with, and every default of it.

The names are those of ``vllm.LLM`` and its engine arguments. Each of them falls in one of three
groups: fields of the configurations below; arguments that are checked and then have no effect
here, because quire has nothing that they could switch (:data:`NO_EFFECT`); and arguments that
this version does not offer (:data:`NOT_OFFERED`), which pass only when they ask for nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

from quire.errors import ConfigError, NotSupportedError
from quire.utils.suggest import unexpected_argument

Check = Callable[[str, Any], Any]
"""Takes an argument's name and value, returns the value as it is kept, or raises ConfigError."""

_MAX_SEED = 2**64 - 1
_DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}


def _refuse(name: str, value: object, right: str) -> ConfigError:
    return ConfigError(f"{name} must be {right}, not {value!r}")


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _integer(low: int, high: float = math.inf) -> Check:
    def check(name: str, value: Any) -> int:
        right = f"an integer of at least {low}" if high == math.inf else f"from {low} to {high}"
        try:
            number = index(value)
        except TypeError:
            raise _refuse(name, value, right) from None
        if isinstance(value, bool) or not low <= number <= high:
            raise _refuse(name, value, right)
        return number

    return check


def _number(low: float, high: float, *, above_low: bool = False) -> Check:
    right = f"a number {'above' if above_low else 'of at least'} {low:g}"
    if high != math.inf:
        right += f" and at most {high:g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _refuse(name, value, right)
        if not low <= value <= high or (above_low and value == low):
            raise _refuse(name, value, right)
        return float(value)

    return check


def _text(name: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise _refuse(name, value, "a string that is not empty, or a path")
    return value


def _choice(*choices: str, later: Collection[str] = ()) -> Check:
    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        if isinstance(value, str) and value in later:
            raise _not_offered(name, value, choices[0])
        raise _refuse(name, value, "one of " + ", ".join(repr(choice) for choice in choices))

    return check


def _dtype(name: str, value: Any) -> str:
    # A torch.dtype is told by its text: this module does not import torch.
    text = value if isinstance(value, str) else str(value)
    kept = _DTYPES.get(text.removeprefix("torch."))
    if kept is None:
        raise _refuse(name, value, "one of " + ", ".join(repr(dtype) for dtype in _DTYPES))
    return kept


def _device(name: str, value: Any) -> str:
    text = str(value)
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (
        colon and not (kind == "cuda" and number.isdecimal())
    ):
        raise _refuse(name, value, "'auto', 'cpu', 'cuda' or 'cuda:<number>'")
    return text


def _model_len(name: str, value: Any) -> int | None:
    # -1 is how vLLM is asked for the longest that fits, which here is what None does.
    if value == -1 and not isinstance(value, bool):
        return None
    length: int = _integer(1)(name, value)
    return length


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if callable(value):
        raise NotSupportedError(
            f"{name}={value!r}: this version of quire takes a dict of config.json fields, "
            "not a function"
        )
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _refuse(name, value, "a dict whose keys are strings")
    return dict(value)


def _token(name: str, value: Any) -> str | bool:
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise ConfigError(f"{name} must be a string, True (the stored token) or False")


def _anything(name: str, value: Any) -> Any:
    return value


def _arg(default: Any, check: Check, *, repr: bool = True) -> Any:
    return field(default=default, repr=repr, metadata={"check": check})


class _Checked:
    """A frozen dataclass that checks and normalises every field as it is made."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            check: Check | None = spec.metadata.get("check")
            value = getattr(self, spec.name)
            # None stands for "not said" in every argument.
            if value is None:
                kept = None if spec.default is dataclasses.MISSING else spec.default
            else:
                kept = value if check is None else check(spec.name, value)
            if kept is None and spec.default is dataclasses.MISSING:
                raise _refuse(spec.name, value, "given")
            object.__setattr__(self, spec.name, kept)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Which model, where it comes from, and how it is read.

    Attributes
    ----------
    model : str
        A folder in the layout of Hugging Face, a name or URL on its hub, or ``quire/demo``.
    tokenizer : str or None
        Where the tokenizer comes from, when not from the model.
    tokenizer_mode : {"auto", "slow"}
        ``"slow"`` reads it with transformers' Python implementation.
    skip_tokenizer_init : bool
        Load no tokenizer: prompts are token ids, and outputs have no text.
    trust_remote_code : bool
        Accepted for models that quire has its own code for; the checkpoint's code never runs.
    dtype : {"auto", "float16", "bfloat16", "float32"}
        What the weights are computed in. ``"auto"`` follows the checkpoint; float32 checkpoints
        become float16 on a GPU and bfloat16 on a CPU that computes in it.
    revision, tokenizer_revision : str or None
        Branch, tag or commit on the hub; the tokenizer's is the model's unless said.
    max_model_len : int or None
        Most tokens of one request, prompt and output together. None: what the model was made
        for, or less where the KV cache cannot hold so much.
    download_dir : str or None
        Where hub files are kept; None is the hub library's own cache.
    hf_token : str, bool or None
        Token for the hub; None looks in the environment.
    hf_overrides : dict or None
        Fields of config.json to replace.
    generation_config : str
        ``"auto"`` takes default sampling parameters from the checkpoint's generation_config.json,
        ``"vllm"`` takes none, anything else is a folder to read that file from.
    chat_template : str or None
        Jinja template for ``chat`` instead of the tokenizer's own.
    """

    model: str = field(metadata={"check": _text})
    tokenizer: str | None = _arg(None, _text)
    tokenizer_mode: str = _arg("auto", _choice("auto", "slow", later=("mistral", "custom")))
    skip_tokenizer_init: bool = _arg(False, _boolean)
    trust_remote_code: bool = _arg(False, _boolean)
    dtype: str = _arg("auto", _dtype)
    revision: str | None = _arg(None, _text)
    tokenizer_revision: str | None = _arg(None, _text)
    max_model_len: int | None = _arg(None, _model_len)
    download_dir: str | None = _arg(None, _text)
    hf_token: str | bool | None = _arg(None, _token, repr=False)
    hf_overrides: dict[str, Any] | None = field(default=None, metadata={"check": _mapping})
    generation_config: str = _arg("auto", _text)
    chat_template: str | None = _arg(None, _text)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(_Checked):
    """How much KV cache there is, and how it is cut up.

    Attributes
    ----------
    block_size : int
        Tokens per block.
    kv_cache_memory_bytes : int or None
        Size of the whole cache in bytes. None: see :func:`quire.utils.memory.plan_kv_cache`.
    num_gpu_blocks_override : int or None
        Number of blocks, the null block included, on whichever device; it wins over
        ``kv_cache_memory_bytes``.
    enable_prefix_caching : bool
        Keep the blocks of finished requests, for later requests that begin with the same tokens.
    gpu_memory_utilization : float
        Share of a GPU's memory that weights and KV cache may take. No effect on a CPU.
    """

    block_size: int = _arg(16, _integer(1, 1024))
    kv_cache_memory_bytes: int | None = _arg(None, _integer(1))
    num_gpu_blocks_override: int | None = _arg(None, _integer(2))
    enable_prefix_caching: bool = _arg(True, _boolean)
    gpu_memory_utilization: float = _arg(0.9, _number(0, 1, above_low=True))


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(_Checked):
    """How much one step computes, and who goes first.

    Attributes
    ----------
    max_num_seqs : int
        Most sequences that run at once.
    max_num_batched_tokens : int
        Most tokens that one step computes.
    enable_chunked_prefill : bool
        Let a step compute a part of a prompt. Without it a prompt is computed whole, so that
        ``max_num_batched_tokens`` must reach ``max_model_len``: see :meth:`token_budget`.
    scheduling_policy : {"fcfs", "priority"}
        First come first served, or by the requests' ``priority``, lower first.
    """

    max_num_seqs: int = _arg(256, _integer(1, 65536))
    max_num_batched_tokens: int = _arg(2048, _integer(1))
    enable_chunked_prefill: bool = _arg(True, _boolean)
    scheduling_policy: str = _arg("fcfs", _choice("fcfs", "priority"))

    def token_budget(self, max_model_len: int) -> int:
        """Return the most tokens of one step for a model of this length.

        It is ``max_num_batched_tokens``, or enough for the longest prompt where prompts are not
        computed in chunks.
        """
        if self.enable_chunked_prefill:
            return self.max_num_batched_tokens
        return max(self.max_num_batched_tokens, max_model_len)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(_Checked):
    """Everything that an engine is made with; made by :meth:`create` from flat arguments.

    Attributes
    ----------
    model : ModelConfig
    cache : CacheConfig
    scheduler : SchedulerConfig
    seed : int
        What requests without a seed of their own draw from.
    device : str
        ``"auto"`` is a GPU where torch finds one, else the CPU; or ``"cpu"``, ``"cuda"``,
        ``"cuda:1"``.
    """

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    seed: int = _arg(0, _integer(0, _MAX_SEED))
    device: str = _arg("auto", _device)

    @classmethod
    def create(cls, model: str | os.PathLike[str], **kwargs: Any) -> EngineConfig:
        """Sort the flat arguments of :class:`quire.LLM` into a configuration.

        Parameters
        ----------
        model : str or path
        **kwargs
            The fields of :class:`ModelConfig`, :class:`CacheConfig`, :class:`SchedulerConfig`,
            ``seed``, ``device``, and the names in :data:`NO_EFFECT` and :data:`NOT_OFFERED`.
            None is the default of any of them.

        Raises
        ------
        TypeError
            For a name that is none of these; the message has the nearest one.
        ConfigError
            For a value of the wrong type or out of range, or values that contradict each other.
        NotSupportedError
            For a value in use of an argument that this version does not offer.
        """
        kwargs["model"] = model
        for name, value in kwargs.items():
            if name not in _ARGUMENTS:
                raise unexpected_argument("LLM", name, _ARGUMENTS)
            if value is None:
                continue
            if name in NOT_OFFERED:
                _check_off(name, value)
            elif name in NO_EFFECT:
                NO_EFFECT[name](name, value)

        parts = {
            part: kind(**{name: kwargs.get(name) for name in _names(kind)})
            for part, kind in _PARTS.items()
        }
        config = cls(seed=kwargs.get("seed"), device=kwargs.get("device"), **parts)  # type: ignore[arg-type]
        return config._with_budget(asked=kwargs.get("max_num_batched_tokens") is not None)

    def _with_budget(self, *, asked: bool) -> EngineConfig:
        """Return the configuration with a token budget that holds the longest prompt it must."""
        longest, budget = self.model.max_model_len, self.scheduler.max_num_batched_tokens
        if longest is None or self.scheduler.token_budget(longest) == budget:
            return self
        if asked:
            raise ConfigError(
                f"max_num_batched_tokens={budget} is less than max_model_len={longest}, and with "
                "enable_chunked_prefill=False a prompt is computed in one step; raise the first, "
                "lower the second, or enable chunked prefill"
            )
        return replace(self, scheduler=replace(self.scheduler, max_num_batched_tokens=longest))

    def to_kwargs(self) -> dict[str, Any]:
        """Return the flat arguments that make an equal configuration, defaults included."""
        flat = {"seed": self.seed, "device": self.device}
        for part in _PARTS:
            flat |= {
                spec.name: getattr(getattr(self, part), spec.name)
                for spec in dataclasses.fields(getattr(self, part))
            }
        return flat


_PARTS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
}


def _names(kind: type[Any]) -> list[str]:
    return [spec.name for spec in dataclasses.fields(kind)]


NO_EFFECT: dict[str, Check] = {
    # Nothing is compiled or captured as a graph, so there is nothing to switch off.
    "enforce_eager": _boolean,
    "compilation_config": _anything,
    "max_seq_len_to_capture": _integer(1),
    "disable_custom_all_reduce": _boolean,
    "disable_cascade_attn": _boolean,
    # Preempted requests are recomputed, never swapped to another memory (GiB).
    "swap_space": _number(0, math.inf),
    # Prefix hits are verified by token ids, whatever the hash.
    "prefix_caching_hash_algo": _text,
    # Counters are always kept; LLM.get_metrics() reads them.
    "disable_log_stats": _boolean,
    # logprobs may ask for any number of tokens.
    "max_logprobs": _integer(-1),
    # No code of a checkpoint runs, so its revision does not matter.
    "code_revision": _text,
    "max_parallel_loading_workers": _integer(1),
}
"""Arguments that are checked and change nothing, each with its check."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "distributed_executor_backend": (None, "uni"),
    "worker_cls": (None, "auto"),
    "worker_extension_cls": (None, ""),
    "quantization": (None,),
    "kv_cache_dtype": ("auto",),
    "calculate_kv_scales": (False,),
    "cpu_offload_gb": (0,),
    "enable_lora": (False,),
    "max_loras": (1,),
    "max_lora_rank": (16,),
    "max_cpu_loras": (None,),
    "lora_dtype": ("auto",),
    "fully_sharded_loras": (False,),
    "speculative_config": (None,),
    "structured_outputs_config": (None,),
    "guided_decoding_backend": (None, "auto"),
    "reasoning_parser": (None, ""),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "override_generation_config": (None, {}),
    "task": (None, "auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "pooler_config": (None,),
    "enable_prompt_embeds": (False,),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None, []),
    "limit_mm_per_prompt": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "load_format": ("auto", "hf"),
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
    "async_scheduling": (False,),
    "scheduler_cls": (None,),
    "kv_transfer_config": (None,),
    "kv_events_config": (None,),
    "profiler_config": (None,),
    "additional_config": (None, {}),
}
"""Arguments that this version does not offer, each with the values that ask for nothing."""

_ARGUMENTS = frozenset(
    [*NO_EFFECT, *NOT_OFFERED, "seed", "device", *(n for k in _PARTS.values() for n in _names(k))]
)


def argument_names() -> list[str]:
    """Return the name of every engine argument, sorted."""
    return sorted(_ARGUMENTS)


def init_signature() -> inspect.Signature:
    """Return the signature of a method ``(self, model, *, <every field>=<its default>)``.

    Arguments that are not offered, or have no effect, are left out.
    """
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", positional)]
    specs = [spec for part in (*_PARTS.values(), EngineConfig) for spec in dataclasses.fields(part)]
    for spec in specs:
        if spec.name == "model" and spec.type == "str":
            parameters.append(inspect.Parameter("model", positional, annotation=spec.type))
        elif spec.name not in _PARTS:
            parameters.append(
                inspect.Parameter(spec.name, keyword, default=spec.default, annotation=spec.type)
            )
    return inspect.Signature(parameters, return_annotation=None)


def _not_offered(name: str, value: object, off: object) -> NotSupportedError:
    return NotSupportedError(
        f"{name}={value!r} is not offered by this version of quire; "
        f"leave it out or set it to {off!r}"
    )


def _check_off(name: str, value: Any) -> None:
    off = NOT_OFFERED[name]
    # The types too: True is equal to 1, and is no size.
    if not any(type(value) is type(nothing) and value == nothing for nothing in off):
        if isinstance(value, float) and value in off:
            return
        raise _not_offered(name, value, off[0])
