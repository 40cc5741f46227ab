"""build_engine: from a configuration to an engine that is ready for its first request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from quire.config.attention_backend import honour_attention_backend
from quire.engine.engine import Engine
from quire.engine.graphs import TorchGraphs, why_eager
from quire.engine.processor import ModelLimits
from quire.engine.runner import ModelRunner, Runner, kv_bytes_per_block
from quire.errors import AdapterError, ConfigError, NotSupportedError, OutOfMemoryError
from quire.executor.launched import Launched, launched_rank
from quire.executor.ray_team import RayTeam
from quire.executor.shard import ShardSettings, describe, load_shard
from quire.executor.team import Crew, Team
from quire.kernels import get_backend
from quire.kernels.attention.choice import why_not, with_attention
from quire.kernels.attention.needs import AttentionNeeds, LayerNeeds
from quire.kernels.cpu.backend import why_missing
from quire.lora.store import AdapterStore, AdapterTools
from quire.models import hub
from quire.models.hf_config import (
    eos_token_ids,
    read_config,
    read_generation_config,
    resolve_dtype,
)
from quire.models.registry import build_spec, family_of, is_classifier
from quire.models.split import check_split
from quire.quantization import registry
from quire.sampling.batch_processors import BatchProcessors
from quire.sampling.sampler import Sampler
from quire.tokenizer import load_tokenizer
from quire.utils import log
from quire.utils.checks import shown
from quire.utils.device import choose_device, is_accelerator, with_index
from quire.utils.memory import KVCachePlan, available_memory, plan_kv_cache, start_line
from quire.utils.out_of_memory import named_out_of_memory
from quire.utils.threads import apply_thread_count

if TYPE_CHECKING:
    from quire.config import EngineConfig, ModelConfig
    from quire.config.lora_config import LoRAConfig
    from quire.models.adapter import Adapter, PreparedAdapter
    from quire.models.decoder import Decoder
    from quire.models.family import Family
    from quire.models.spec import DecoderSpec
    from quire.quantization.format import Quantizer, WeightFormat
    from quire.quantization.on_load import CalibratedQuantizer
    from quire.tokenizer.tokenizer import Tokenizer

logger = log.get_logger()


class Copies(Protocol):
    """The copies of an engine, of which each process builds one.

    Attributes
    ----------
    count : int
        How many share this machine's memory.
    cores_shared_by : int
        How many share the cores that this process may run on.
    """

    count: int
    cores_shared_by: int

    def agree(self, make: Callable[[], KVCachePlan]) -> KVCachePlan:
        """Return the plan that all of them go by, each having made one when all have loaded."""


def build_engine(config: EngineConfig, copies: Copies | None = None) -> Engine:
    """Find, read and place a model; size its KV cache; make the engine.

    Parameters
    ----------
    config : EngineConfig
    copies : Copies, optional
        Where this engine is one of several, which :mod:`quire.replicas` builds.

    Raises
    ------
    ModelNotFoundError
        When the model's name leads nowhere.
    AdapterError
        When one of ``lora_modules`` cannot be had; the message has its name.
    ModelLoadError
        When the checkpoint is damaged or of an unsupported kind; TokenizerError likewise.
    ConfigError
        When an argument does not fit the model.
    OutOfMemoryError
        When weights or KV cache do not fit.
    """
    _check_parallel(config)
    processors = BatchProcessors(config.logits_processors)
    with ExitStack() as undo:
        undo.callback(processors.close)  # the next attempt may be given the same ones
        engine = _build(config, processors, copies, undo)
        undo.pop_all()
    return engine


def _check_parallel(config: EngineConfig) -> None:
    parallel = config.parallel
    if parallel.data_parallel_backend == "ray":
        raise ConfigError(
            "data_parallel_backend='ray' is for `quire serve`, whose copies are replicas of Ray "
            "Serve: leave it out, or use 'mp'"
        )
    if parallel.data_parallel_size > 1:
        raise NotSupportedError(
            f"data_parallel_size={parallel.data_parallel_size}: build_engine makes one of the "
            "copies; quire.LLM makes all of them"
        )


def _build(
    config: EngineConfig, processors: BatchProcessors, copies: Copies | None, undo: ExitStack
) -> Engine:
    parallel = config.parallel
    rank = 0
    if parallel.backend == "external_launcher":
        rank = launched_rank(parallel.num_ranks)
    log.configure(f"rank {rank}" if rank else "")
    num_threads = apply_thread_count()
    device = with_index(choose_device(config.device))
    attention = config.attention_backend or honour_attention_backend()
    kernels = get_backend(device)
    if device.type == "cpu" and (reason := why_missing()) is not None:
        logger.warning("%s; until then the slower reference kernels run", reason)
    path = hub.resolve_model(config.model)
    hf_config = read_config(path, config.model.hf_overrides)
    weight_format, quantizer = registry.choose(
        config.model.quantization,
        config.model.quantization_config,
        registry.config_of(path, hf_config),
    )
    how = weight_format or quantizer
    if config.model.load_format == "dummy":
        _check_dummy(weight_format, quantizer)
    if how is not None and not callable(getattr(kernels, "quantized_linear", None)):
        raise ConfigError(
            f"quantization {how.name!r}: the {kernels.name} kernels on {device} cannot multiply "
            "weights in codes. QUIRE_KERNELS=reference names kernels that can, on any device; or "
            "take an unquantized model"
        )
    dtype = resolve_dtype(hf_config, config.model.dtype, device, quantized=how is not None)
    tokenizer = None
    if not config.model.skip_tokenizer_init:
        tokenizer = _load_tokenizer(config.model, path, hf_config)
    asked_len = config.model.max_model_len
    if quantizer is not None:
        _calibrate(quantizer, path, hf_config, tokenizer, config)
    settings = ShardSettings(
        path=str(path),
        hf_config=dict(hf_config),
        dtype=str(dtype).removeprefix("torch."),
        device_type=device.type,
        quantization=config.model.quantization,
        quantization_config=config.model.quantization_config,
        load_format=config.model.load_format,
        max_model_len=asked_len,
        max_adapters=config.lora.max_loras if config.lora.enable_lora else 0,
        num_threads=max(1, num_threads // parallel.num_ranks)
        if parallel.backend == "mp"
        else num_threads,
        tensor_size=parallel.tensor_parallel_size,
        num_stages=parallel.pipeline_parallel_size,
        expert_parallel=parallel.enable_expert_parallel,
        num_replicas=1 if copies is None else copies.cores_shared_by,
        step=_largest_step(config, hf_config, dtype) if is_accelerator(device) else None,
        attention=attention,
    )
    if attention is not None:
        _check_attention(attention, config, build_spec(hf_config, asked_len), dtype, device)
        kernels = with_attention(kernels, attention, device)
    place = settings.place(rank)
    team: Crew | Launched | None = None
    if parallel.num_ranks > 1:
        check_split(build_spec(hf_config, asked_len), place)  # before others start
        device = settings.device(rank)
        if parallel.backend == "mp":
            team = Team(settings, device)
        elif parallel.backend == "ray":
            team = team_of_ray = RayTeam(settings, device, _where_found(config.model, path))
            settings, device = team_of_ray.settings, team_of_ray.device
        else:
            team = Launched(settings, rank, device)
        undo.callback(team.close)
    group = None if team is None else team.ends.group
    model = load_shard(settings, place, group, device, (weight_format, quantizer))
    graphless = why_eager(config, model, kernels, device)
    if settings.step is not None and graphless is None:
        settings.step["has_graphs"] = True
    described = describe(model, device, settings)
    shards = [described] if team is None else team.exchange_shards(described)
    if how is not None:
        _warn_of_no_effect(how, model)
    if config.batch_invariant and model.native is None:
        raise ConfigError(
            "batch_invariant=True holds where the native CPU kernels run, on a CPU and in float32 "
            f"or bfloat16, and here it would be the {kernels.name} kernels on {device} in "
            f"{str(dtype).removeprefix('torch.')}: use device='cpu', another dtype, an install "
            "that has them (see `quire collect-env`), or leave the argument out"
        )
    # Before the KV cache, which is measured by the memory that is left.
    spread = team.spread(model) if isinstance(team, Crew) else None
    prepare = model.prepare_adapter if spread is None else spread.prepare
    adapters = _make_store(config, model, family_of(hf_config)[1], dtype, prepare)
    kv_cache_dtype = choose_kv_cache_dtype(config.cache.kv_cache_dtype, dtype)
    if model.native is not None:
        model.native.check_cache_dtype(kv_cache_dtype)
    make_plan = partial(
        _plan_cache,
        config,
        model.spec.max_position,
        partial(_cache_memory, shards, device, config.cache.block_size, kv_cache_dtype),
        1 if copies is None else copies.count,
    )
    plan = make_plan() if copies is None else copies.agree(make_plan)
    if isinstance(team, Launched):
        plan = KVCachePlan(**team.of_rank_0("cache", dataclasses.asdict(plan)))
    with named_out_of_memory(
        f"a KV cache of {plan.num_blocks} blocks",
        device,
        f"lower gpu_memory_utilization={config.cache.gpu_memory_utilization}, max_num_seqs="
        f"{config.scheduler.max_num_seqs} or max_model_len={plan.max_model_len}, or ask for less "
        "by kv_cache_memory_bytes",
    ):
        own = ModelRunner(
            model,
            kernels,
            num_blocks=plan.num_blocks,
            block_size=config.cache.block_size,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
        )
        if graphless is None:
            own.use_graphs(
                TorchGraphs(device),
                max_num_seqs=config.scheduler.max_num_seqs,
                max_model_len=plan.max_model_len,
            )
    if graphless is not None and is_accelerator(device):
        logger.info("no graphs: %s", graphless)
    runner: Runner = own
    if isinstance(team, Launched):
        runner = team.make_runner(own)
    elif team is not None and spread is not None:
        allocation = {
            "num_blocks": plan.num_blocks,
            "block_size": config.cache.block_size,
            "kv_cache_dtype": str(kv_cache_dtype).removeprefix("torch."),
        }
        runner = team.make_runner(own, spread, allocation)
    if plan.max_model_len < 2:
        raise ConfigError(
            f"max_model_len comes to {plan.max_model_len}, and the shortest request has two "
            "tokens, one given and one generated: raise max_model_len, or the KV cache's "
            "num_gpu_blocks_override, kv_cache_memory_bytes or block_size"
        )
    recommended = _recommended(config.model, path)
    recommended |= config.model.override_generation_config or {}
    # A folder of the user's goes before the model's own file, where it says how a text ends.
    has_ends = recommended.get("eos_token_id") is not None
    ends = recommended if has_ends else read_generation_config(path)
    limits = ModelLimits(
        vocab_size=model.spec.vocab_size,
        max_model_len=plan.max_model_len,
        max_cache_tokens=(plan.num_blocks - 1) * config.cache.block_size,
        # An id that the model has no row for cannot be generated, nor masked by min_tokens.
        eos_token_ids=tuple(
            id_ for id_ in eos_token_ids(hf_config, ends) if id_ < model.spec.vocab_size
        ),
        default_params=recommended,
        hidden_size=model.spec.hidden_size,
        generates=not is_classifier(hf_config),
    )
    sampler = Sampler(
        vocab_size=model.spec.vocab_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        device=device,
        kernels=kernels,
        processors=processors,
    )
    logger.info(
        start_line(
            model=config.model.model,
            dtype=_dtype_words(hf_config, dtype),
            quantization=_quantization_words(how, model),
            device=str(device),
            backend=kernels.name,
            plan=plan,
            block_size=config.cache.block_size,
            cache_dtype=config.cache.kv_cache_dtype,
            num_threads=settings.num_threads if device.type == "cpu" else None,
            ranks=_ranks_words(config),
        )
    )
    try:
        return Engine(
            config,
            runner=runner,
            tokenizer=tokenizer,
            limits=limits,
            num_blocks=plan.num_blocks,
            sampler=sampler,
            adapters=adapters,
        )
    except MemoryError as error:
        raise OutOfMemoryError(
            f"no room for the tables of max_num_seqs={config.scheduler.max_num_seqs} requests of "
            f"max_model_len={plan.max_model_len} tokens: lower one of them ({error})"
        ) from error


def _check_attention(
    name: str, config: EngineConfig, spec: DecoderSpec, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse attention that cannot be had here, or not for a model and its KV cache."""
    needs = AttentionNeeds(
        dtype=dtype,
        cache_dtype=choose_kv_cache_dtype(config.cache.kv_cache_dtype, dtype),
        block_size=config.cache.block_size,
        layers=frozenset(
            LayerNeeds(
                num_heads=each.num_heads,
                num_kv_heads=each.num_kv_heads,
                head_dim=each.head_dim,
                sliding_window=each.sliding_window,
                softcap=each.softcap,
                has_alibi=each.alibi_slopes is not None,
            )
            for each in (layer.attention for layer in spec.layers)
        ),
    )
    if (reason := why_not(name, device, needs)) is not None:
        asked = config.attention_backend is not None
        variable = "attention_backend" if asked else "QUIRE_ATTENTION_BACKEND"
        raise ConfigError(f"{variable}={name!r}: {reason}")


def _largest_step(
    config: EngineConfig, hf_config: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the fields of the `StepSize` that there must be room for."""
    scheduler, asked = config.scheduler, config.model.max_model_len
    max_len = asked or build_spec(hf_config, asked).max_position
    num_tokens = scheduler.token_budget(max_len or 0)
    cache_dtype = choose_kv_cache_dtype(config.cache.kv_cache_dtype, dtype)
    return {
        "num_tokens": num_tokens,
        "num_seqs": min(scheduler.max_num_seqs, num_tokens),
        "max_len": max_len or num_tokens,
        "block_size": config.cache.block_size,
        "kv_cache_dtype": str(cache_dtype).removeprefix("torch."),
        **_adapter_slots(config.lora, dtype),
    }


def _adapter_slots(lora: LoRAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of a `StepSize` that adapters have."""
    if not lora.enable_lora:
        return {}
    is_own = lora.lora_dtype != "auto"
    return {
        "max_adapters": lora.max_loras,
        "adapter_rank": lora.max_lora_rank,
        "adapter_dtype": lora.lora_dtype if is_own else str(dtype).removeprefix("torch."),
    }


def _where_found(config: ModelConfig, path: Path) -> dict[str, Any]:
    """Return what another machine finds a model by: its name, or this folder's path."""
    if config.model != hub.DEMO_MODEL and hub.existing_path(config.model) is not None:
        return {"model": str(path)}
    return {
        "model": config.model,
        "revision": config.revision,
        "download_dir": config.download_dir,
    }


def _make_store(
    config: EngineConfig,
    model: Decoder,
    family: Family,
    dtype: torch.dtype,
    prepare: Callable[[Adapter], PreparedAdapter],
) -> AdapterStore:
    """Return the adapters of an engine, those of ``lora_modules`` read."""
    settings = config.lora
    if not settings.enable_lora:
        return AdapterStore(settings)
    from quire.lora.content import fingerprint
    from quire.lora.peft_adapter import read_adapter
    from quire.lora.place import folder_of

    if settings.lora_dtype != "auto":
        dtype = getattr(torch, settings.lora_dtype)
    tools = AdapterTools(
        find=partial(
            folder_of, download_dir=config.model.download_dir, token=config.model.hf_token
        ),
        look=fingerprint,
        read=partial(
            read_adapter,
            decoder=model,
            family=family,
            max_rank=settings.max_lora_rank,
            dtype=dtype,
        ),
        prepare=prepare,
    )
    store = AdapterStore(settings, tools)
    for each in settings.lora_modules:
        try:
            store.load(
                each.lora_path,
                each.lora_name,
                load_inplace=each.load_inplace,
                base_model_name=each.base_model_name,
            )
        except AdapterError as error:
            raise AdapterError(f"lora_modules: {each.lora_name!r}: {error}") from error
    return store


def choose_kv_cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return what keys and values are kept in, by the name that a configuration has for it."""
    if name == "auto":
        return model_dtype
    dtype: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    return dtype


def _dtype_words(hf_config: dict[str, Any], dtype: torch.dtype) -> str:
    chosen = str(dtype).removeprefix("torch.")
    stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or chosen)
    stored = stored.removeprefix("torch.")
    return chosen if stored == chosen else f"{chosen} (stored as {stored})"


def _calibrate(
    quantizer: Quantizer,
    path: Path,
    hf_config: dict[str, Any],
    tokenizer: Tokenizer | None,
    config: EngineConfig,
) -> None:
    """Show a quantizer that asks for it what the plain model does with some prompts."""
    if not getattr(quantizer, "prompts", ()):
        return
    if config.parallel.num_ranks > 1:
        raise ConfigError(
            "quantization_config['calibration'] looks at the whole model, which here would be "
            f"divided among {config.parallel.num_ranks} ranks: make a folder by `quire quantize` "
            "and load that"
        )
    from quire.models.calibration import calibrate

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise ConfigError(
                "quantization_config['calibration'] has texts, and there is no tokenizer by "
                "skip_tokenizer_init: give token ids"
            )
        return tokenizer.encode(text)

    calibrate(
        cast("CalibratedQuantizer", quantizer), path, hf_config, encode, config.model.max_model_len
    )


def _check_dummy(weight_format: WeightFormat | None, quantizer: Quantizer | None) -> None:
    if weight_format is not None:
        raise ConfigError(
            f"load_format='dummy' draws plain weights, and the model is in the codes of "
            f"{weight_format.name!r}: take a plain model and a quantization that is made while it "
            "is loaded, such as quantization='int8'"
        )
    if getattr(quantizer, "prompts", ()):
        raise ConfigError(
            "load_format='dummy' has no weights that quantization_config['calibration'] could "
            "look at: leave one of them out"
        )


def _warn_of_no_effect(how: WeightFormat | Quantizer, model: Decoder) -> None:
    """Say where a model is less quantized, or more, than somebody may believe."""
    unmet: list[str] = getattr(getattr(how, "ignored", None), "unmet", list)()
    if unmet:
        logger.warning(
            "quantization_config['ignore'] has %s, by which no module is meant; they are called "
            "such as 'layers.0.attention.qkv.q', 'layers.0.mlp.down' and 'lm_head'",
            ", ".join(map(repr, unmet[:10])),
        )
    if not model.code_kinds():
        logger.warning("quantization %r: all weights are plain, none is in codes", how.name)


def _quantization_words(how: WeightFormat | Quantizer | None, model: Decoder) -> str | None:
    """Say what the weights are quantized to, and how many bits the whole model takes for each."""
    if how is None:
        return None
    kinds = sorted(model.code_kinds())
    words = how.name if kinds == [how.name] else f"{how.name} ({', '.join(kinds) or 'no codes'})"
    return f"{words}, {model.weight_bytes() / 2**20:,.0f} MiB"


def _cache_memory(
    ranks: Sequence[Mapping[str, Any]], device: torch.device, block_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what a block of KV cache takes, and how much memory there is, over all ranks.

    Those on a CPU share its memory; of others, the one with the least for the most decides.
    """
    needed = [kv_bytes_per_block(each["kv_cache_layers"], block_size, dtype) for each in ranks]
    if device.type == "cpu":
        return {"bytes_per_block": sum(needed)}
    return {
        "bytes_per_block": max(needed),
        "free_bytes": min(each["free_bytes"] for each in ranks),
        "total_bytes": max(each["total_bytes"] for each in ranks),
        "step_bytes": max(each["step_bytes"] for each in ranks),
    }


def _plan_cache(
    config: EngineConfig,
    model_max_len: int | None,
    measure: Callable[[], dict[str, Any]],
    num_copies: int,
) -> KVCachePlan:
    """Size a KV cache by what memory there is now; copies of the engine divide that of the host."""
    memory = measure()
    if num_copies > 1:
        memory.setdefault("free_bytes", available_memory() // num_copies)
    return plan_kv_cache(config, model_max_len=model_max_len, **memory)


def _ranks_words(config: EngineConfig) -> str:
    """Say how many ranks compute the model; nothing where it is one."""
    parallel = config.parallel
    if parallel.num_ranks == 1:
        return ""
    words = [
        (parallel.tensor_parallel_size, "tensor-parallel"),
        (parallel.pipeline_parallel_size, "pipeline-parallel"),
    ]
    named = " x ".join(f"{size} {name}" for size, name in words if size > 1)
    return f"{named} ranks"


def _load_tokenizer(config: ModelConfig, path: Path, hf_config: dict[str, Any]) -> Tokenizer:
    is_beside = config.tokenizer is None and config.tokenizer_revision is None
    return load_tokenizer(
        path if is_beside else hub.resolve_tokenizer(config),
        mode=config.tokenizer_mode,
        trust_remote_code=config.trust_remote_code,
        model_config=hf_config,
    )


def _recommended(config: ModelConfig, path: Path) -> dict[str, Any]:
    if config.generation_config == "vllm":
        return {}
    if config.generation_config == "auto":
        return read_generation_config(path)
    given = hub.existing_path(config.generation_config)
    if (
        given is None
        or not (given / "generation_config.json" if given.is_dir() else given).is_file()
    ):
        raise ConfigError(
            f"generation_config is {shown(config.generation_config)}, which has no "
            "generation_config.json; it must be 'auto', 'vllm' or a folder with that file"
        )
    return read_generation_config(given)
