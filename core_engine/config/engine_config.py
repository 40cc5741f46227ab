"""EngineConfig and its parts; every default stands here once."""

from __future__ import annotations

import dataclasses
import inspect
import os
from dataclasses import dataclass, field, replace
from typing import Any

from quire.config import checks
from quire.config.attention_backend import attention_backend
from quire.config.checked import Checked, argument
from quire.config.compatibility import NO_EFFECT, NOT_OFFERED, check_off
from quire.config.lora_config import LoRAConfig
from quire.config.parallel_config import ParallelConfig
from quire.errors import ConfigError
from quire.logits_processor import LogitsProcessor
from quire.structured_outputs import BACKENDS
from quire.utils.suggest import unexpected_argument


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
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
    quantization : str or None
        What the weights are quantized to: the format of the checkpoint (``"awq"``, ``"gptq"``,
        ``"squeezellm"``, ``"compressed-tensors"``, ``"fp8"``, ``"bitsandbytes"``), or, for a plain
        checkpoint, what it is quantized to while it is loaded (``"int8"``, ``"w8a8"``, ``"int4"``,
        ``"fp8"``, ``"nf4"``). None: what the checkpoint says of itself.
    quantization_config : dict or None
        Options of quantizing while loading, such as ``{"group_size": 64, "lm_head": None}``; see
        ``core_engine/quantization/README.md``.
    load_format : {"auto", "hf", "dummy"}
        ``"dummy"`` draws random weights on the device, of the sizes that config.json says, and
        reads none: to measure speed. The others read what the model has.
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
    override_generation_config : dict or None
        Fields of that file to replace, such as ``{"temperature": 0.5}``.
    chat_template : str or None
        Jinja template for ``chat`` instead of the tokenizer's own.
    """

    model: str = field(metadata={"check": checks.text})
    tokenizer: str | None = argument(None, checks.text)
    tokenizer_mode: str = argument(
        "auto", checks.choice("auto", "slow", later=("mistral", "custom"))
    )
    skip_tokenizer_init: bool = argument(False, checks.boolean)
    trust_remote_code: bool = argument(False, checks.boolean)
    dtype: str = argument("auto", checks.dtype)
    quantization: str | None = argument(None, checks.quantization)
    quantization_config: dict[str, Any] | None = field(
        default=None, metadata={"check": checks.mapping}
    )
    load_format: str = argument("auto", checks.load_format)
    revision: str | None = argument(None, checks.text)
    tokenizer_revision: str | None = argument(None, checks.text)
    max_model_len: int | None = argument(None, checks.model_len)
    download_dir: str | None = argument(None, checks.text)
    hf_token: str | bool | None = argument(None, checks.token, repr=False)
    hf_overrides: dict[str, Any] | None = field(default=None, metadata={"check": checks.mapping})
    generation_config: str = argument("auto", checks.text)
    override_generation_config: dict[str, Any] | None = field(
        default=None, metadata={"check": checks.generation_fields}
    )
    chat_template: str | None = argument(None, checks.text)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Checked):
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
    kv_cache_dtype : {"auto", "fp8", "int8", "bfloat16", "float16", "float32"}
        What keys and values are kept in; ``"auto"`` is the model's own type. ``"fp8"`` (also
        ``"fp8_e4m3"``) and ``"int8"`` take one byte per number and four per key or value of a
        head, for the scale that each has.
    enable_prefix_caching : bool
        Keep the blocks of finished requests, for later requests that begin with the same tokens.
    gpu_memory_utilization : float
        Share of a GPU's memory that weights and KV cache may take. No effect on a CPU.
    swap_space : float or None
        GiB of host memory, taken at the first use, to which blocks of preempted requests are
        copied, and from which they come back; what does not fit there is computed anew. None: 4
        for an accelerator, 0 for a CPU. No effect for a model on several ranks.
    """

    block_size: int = argument(16, checks.integer(1, 1024))
    kv_cache_memory_bytes: int | None = argument(None, checks.integer(1))
    num_gpu_blocks_override: int | None = argument(None, checks.integer(2))
    kv_cache_dtype: str = argument("auto", checks.kv_cache_dtype)
    enable_prefix_caching: bool = argument(True, checks.boolean)
    gpu_memory_utilization: float = argument(0.9, checks.number(0, 1, above_low=True))
    swap_space: float | None = argument(None, checks.number(0, 2**20))


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Checked):
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
    max_waiting_requests : int or None
        Requests of :class:`quire.AsyncLLM`, and so of a server, that may wait for others to end;
        one more fails with EngineBusyError. None sets no bound.
    async_scheduling : bool or None
        Launch each step while the tokens of the one before are on their way to the host, so that
        an accelerator need not wait for it. Answers are the same. Steps for requests with a
        grammar, a beam search or logits processors do not overlap, nor those of a model on
        several ranks. None: on an accelerator, not on a CPU.
    """

    max_num_seqs: int = argument(256, checks.integer(1, 65536))
    # Enough rows for matrix products at full speed on a CPU; activations grow with it.
    max_num_batched_tokens: int = argument(512, checks.integer(1))
    enable_chunked_prefill: bool = argument(True, checks.boolean)
    scheduling_policy: str = argument("fcfs", checks.choice("fcfs", "priority"))
    max_waiting_requests: int | None = argument(None, checks.integer(0))
    async_scheduling: bool | None = argument(None, checks.boolean)

    def token_budget(self, max_model_len: int) -> int:
        """Return the most tokens of one step for a model of this length.

        It is ``max_num_batched_tokens``, or enough for the longest prompt where prompts are not
        computed in chunks.
        """
        if self.enable_chunked_prefill:
            return self.max_num_batched_tokens
        return max(self.max_num_batched_tokens, max_model_len)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsConfig(Checked):
    """What enforces the constraints of requests with ``structured_outputs``.

    Attributes
    ----------
    structured_outputs_backend : {"llguidance", "outlines_core", "xgrammar"}
        The library, for requests that name none.
    structured_outputs_deadline : float
        Most seconds that compiling one constraint may take; a request that needs longer fails.
    structured_outputs_forced_tokens : bool
        Let a step compute the text that a grammar forces along with the token before it. The
        model still decides how that text is written in tokens, so that results are the same; they
        take fewer steps.
    """

    structured_outputs_backend: str = argument("llguidance", checks.choice(*BACKENDS))
    structured_outputs_deadline: float = argument(10.0, checks.number(0, 3600, above_low=True))
    structured_outputs_forced_tokens: bool = argument(True, checks.boolean)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Checked):
    """Everything that an engine is made with; made by :meth:`create` from flat arguments.

    Attributes
    ----------
    model : ModelConfig
    cache : CacheConfig
    scheduler : SchedulerConfig
    structured : StructuredOutputsConfig
    lora : LoRAConfig
    parallel : ParallelConfig
    seed : int
        What requests without a seed of their own draw from.
    device : str
        ``"auto"`` is an accelerator where torch finds one, else the CPU; or ``"cpu"``, or what
        torch calls it: ``"cuda"`` (NVIDIA's and AMD's GPUs), ``"xpu"`` (Intel's), ``"cuda:1"``.
    batch_invariant : bool or None
        Whether a request's log-probabilities must have the same bits whatever else is in the
        batch, and however its prompt is cut, cached or taken up again. The native CPU kernels do
        so in float32 and bfloat16 at no cost, so None has it wherever they run; True refuses
        a model or a machine that they do not run on.
    attention_backend : {"TRITON", "SDPA", "FLASH_ATTN", "FLASHINFER"} or None
        Who computes attention; vLLM's names for these are taken as well. None: what
        QUIRE_ATTENTION_BACKEND says, else the kernels of the device. ``"SDPA"`` is torch's own, and
        the last two are packages that must be installed, and have never been run by us.
    enforce_eager : bool
        Whether every step runs operation by operation. Without it, a GPU's steps of one token per
        sequence are recorded as graphs, where kernels and model allow it. No effect on a CPU.
    logits_processors : tuple of LogitsProcessor or type
        The engine's own, which serve all requests; see :class:`quire.LogitsProcessor`.
    """

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    structured: StructuredOutputsConfig = field(default_factory=StructuredOutputsConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = argument(0, checks.integer(0, 2**64 - 1))
    device: str = argument("auto", checks.device)
    batch_invariant: bool | None = argument(None, checks.boolean)
    attention_backend: str | None = argument(None, attention_backend)
    enforce_eager: bool = argument(False, checks.boolean)
    logits_processors: tuple[LogitsProcessor | type[LogitsProcessor], ...] = argument(
        (), checks.processors
    )

    @classmethod
    def create(cls, model: str | os.PathLike[str], **kwargs: Any) -> EngineConfig:
        """Sort the flat arguments of :class:`quire.LLM` into a configuration.

        Parameters
        ----------
        model : str or path
        **kwargs
            The fields of :class:`ModelConfig`, :class:`CacheConfig`, :class:`SchedulerConfig`,
            :class:`StructuredOutputsConfig`, :class:`LoRAConfig`, :class:`ParallelConfig`,
            ``seed``, ``device``, ``batch_invariant``, ``attention_backend``, ``enforce_eager``,
            ``logits_processors``, and the names in :mod:`quire.config.compatibility`. None is the
            default of any of them.

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
                check_off(name, value)
            elif name in NO_EFFECT:
                NO_EFFECT[name](name, value)

        parts: dict[str, Any] = {
            part: kind(**{name: kwargs.get(name) for name in _names(kind)})
            for part, kind in _PARTS.items()
        }
        parts.update((name, kwargs.get(name)) for name in _OWN)
        config = cls(**parts)
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
        flat = {name: getattr(self, name) for name in _OWN}
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
    "structured": StructuredOutputsConfig,
    "lora": LoRAConfig,
    "parallel": ParallelConfig,
}

_OWN = (
    "seed",
    "device",
    "batch_invariant",
    "attention_backend",
    "enforce_eager",
    "logits_processors",
)
"""The flat arguments that are fields of the whole."""


def _names(kind: type[Any]) -> list[str]:
    return [spec.name for spec in dataclasses.fields(kind)]


_ARGUMENTS = frozenset(
    [*NO_EFFECT, *NOT_OFFERED, *_OWN, *(n for k in _PARTS.values() for n in _names(k))]
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
