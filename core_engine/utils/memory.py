"""How much memory there is, and how much of it becomes KV cache."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import ConfigError, OutOfMemoryError
from quire.utils.cgroup import cgroup_folders, read_text
from quire.utils.log import get_logger

if TYPE_CHECKING:
    from quire.config import EngineConfig

logger = get_logger(__name__)

GIB = 1 << 30
CPU_CACHE_LIMIT = 4 * GIB
"""Most bytes of KV cache on a CPU when no size was asked for."""
CPU_CACHE_SHARE = 0.4
"""Most of the free memory that becomes KV cache on a CPU when no size was asked for."""


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """The size of a KV cache and the longest request that it lets in.

    Attributes
    ----------
    num_blocks : int
        Blocks to allocate. Block 0 is the null block, which holds no request's tokens.
    max_model_len : int
        Most tokens of one request.
    num_full_requests : int
        Requests of ``max_model_len`` tokens that the cache holds at once.
    """

    num_blocks: int
    max_model_len: int
    num_full_requests: int


def format_bytes(num_bytes: float) -> str:
    """Return a size for people: ``"1.50 GiB"``, ``"12.0 MiB"``, ``"300 bytes"``."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    if num_bytes >= 1 << 20:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes:.0f} bytes"


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that this process can still take.

    The least of what the system calls available and of what each of the process's cgroups has
    left. A group's page cache counts as left, except for mapped files: these may be the weights.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are looked for.
    """
    return max(0, min([_system_available(root), *_cgroups_available(root)]))


def _system_available(root: Path) -> int:
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups_available(root: Path) -> Iterator[int]:
    for folder in cgroup_folders("memory", root):
        if (limit := read_text(folder / "memory.max")) is not None:
            used, prefix = read_text(folder / "memory.current"), ""
            mapped_name = "file_mapped"
        else:
            limit = read_text(folder / "memory.limit_in_bytes")
            # In version 1 the plain counters leave out the groups below; the totals do not.
            used, prefix = read_text(folder / "memory.usage_in_bytes"), "total_"
            mapped_name = "mapped_file"
        if limit is None or used is None or not limit.isdecimal() or not used.isdecimal():
            continue
        stat: dict[str, int] = {}
        for line in (read_text(folder / "memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if value.isdecimal():
                stat[name] = int(value)
        cached = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
        reclaimable = max(0, cached - stat.get(f"{prefix}{mapped_name}", 0))
        yield int(limit) - int(used) + reclaimable


def plan_kv_cache(
    config: EngineConfig,
    *,
    bytes_per_block: int,
    model_max_len: int | None,
    free_bytes: int | None = None,
    total_bytes: int | None = None,
    step_bytes: int = 0,
) -> KVCachePlan:
    """Decide how many blocks of KV cache there are, and the longest request they let in.

    As many as was asked for by ``num_gpu_blocks_override``, else by ``kv_cache_memory_bytes``.
    When neither was: on a CPU the least of ``max_num_seqs`` requests of full length, 4 GiB, and
    40% of the free memory; on an accelerator what ``gpu_memory_utilization`` leaves beside the
    weights and the largest step, and no more than ``max_num_seqs`` requests of full length can use.

    Parameters
    ----------
    config : EngineConfig
    bytes_per_block : int
        Bytes of one block over all layers, keys and values together.
    model_max_len : int or None
        Most tokens that the model was made for; None where its positions have no end.
    free_bytes : int, optional
        Bytes free on the device, weights loaded; by default the host's :func:`available_memory`.
    total_bytes : int, optional
        All bytes of an accelerator; None for a CPU.
    step_bytes : int, optional
        What the largest step takes beside weights and cache.

    Raises
    ------
    ConfigError
        The ``max_model_len`` that was asked for is longer than the model or the cache allows.
    OutOfMemoryError
        There is no room for the cache that was asked for, or for one block.
    """
    asked = config.model.max_model_len
    if asked is not None and model_max_len is not None and asked > model_max_len:
        raise ConfigError(
            f"max_model_len={asked} is more than the {model_max_len} positions that the model "
            f"was made for; set it to {model_max_len} or less"
        )
    wanted = asked or model_max_len
    free = available_memory() if free_bytes is None else free_bytes
    num_blocks = _count_blocks(config, bytes_per_block, wanted, free, total_bytes, step_bytes)

    block_size = config.cache.block_size
    capacity = (num_blocks - 1) * block_size
    size = f"{num_blocks - 1} blocks of {block_size} tokens"
    if wanted is None:
        wanted = capacity
    elif wanted > capacity and asked is not None:
        needed = (math.ceil(asked / block_size) + 1) * bytes_per_block
        raise ConfigError(
            f"max_model_len={asked} does not fit in the KV cache of {capacity} tokens ({size}, "
            f"{format_bytes(num_blocks * bytes_per_block)}): set max_model_len to {capacity} or "
            f"less, or kv_cache_memory_bytes to {needed} ({format_bytes(needed)}) or more"
        )
    elif wanted > capacity:
        logger.warning(
            "max_model_len is %d instead of the model's %d tokens: the KV cache holds %s (%s); "
            "set kv_cache_memory_bytes for more",
            capacity,
            wanted,
            size,
            format_bytes(num_blocks * bytes_per_block),
        )
        wanted = capacity
    full_requests = (num_blocks - 1) // math.ceil(wanted / block_size)
    return KVCachePlan(num_blocks, wanted, full_requests)


def _count_blocks(
    config: EngineConfig,
    bytes_per_block: int,
    max_model_len: int | None,
    free: int,
    total: int | None,
    step: int,
) -> int:
    """Return the number of blocks, the null block included: at least 2."""
    cache = config.cache
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
        asked = f"num_gpu_blocks_override={num_blocks}"
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // bytes_per_block
        asked = f"kv_cache_memory_bytes={cache.kv_cache_memory_bytes}"
    else:
        if total is None:
            budget = min(CPU_CACHE_LIMIT, int(CPU_CACHE_SHARE * free))
        else:
            budget = int(free - (1 - cache.gpu_memory_utilization) * total) - step
        num_blocks = max(budget, 0) // bytes_per_block
        if max_model_len is not None:
            per_request = math.ceil(max_model_len / cache.block_size)
            num_blocks = min(num_blocks, config.scheduler.max_num_seqs * per_request + 1)
        asked = ""
    needed = num_blocks * bytes_per_block
    if asked and needed > free - step:
        beside = ""
        if step:
            beside = f", of which a step {_largest_step(config)} takes {format_bytes(step)}"
        raise OutOfMemoryError(
            f"{asked}: a KV cache of {format_bytes(needed)} was asked for, and only "
            f"{format_bytes(free)} of memory are free{beside}; ask for less"
        )
    if num_blocks < 2 and total is not None and not asked:
        allowed = total * cache.gpu_memory_utilization
        raise OutOfMemoryError(
            f"no room for the KV cache: two blocks of {cache.block_size} tokens take "
            f"{format_bytes(2 * bytes_per_block)}; gpu_memory_utilization="
            f"{cache.gpu_memory_utilization} lets {format_bytes(allowed)}"
            f" of {format_bytes(total)} be taken, weights and whatever else is there take "
            f"{format_bytes(total - free)}, and a step {_largest_step(config)} takes "
            f"{format_bytes(step)}: raise the first; lower max_num_batched_tokens, max_num_seqs or "
            "max_model_len; or take quantization= or a higher tensor_parallel_size"
        )
    if num_blocks < 2:
        raise OutOfMemoryError(
            f"no room for the KV cache: two blocks of {cache.block_size} tokens take "
            f"{format_bytes(2 * bytes_per_block)}, "
            + (f"{asked} is less" if asked else f"{format_bytes(free)} of memory are free")
            + "; free memory, raise kv_cache_memory_bytes or lower block_size"
        )
    return num_blocks


def _largest_step(config: EngineConfig) -> str:
    scheduler = config.scheduler
    words = (
        f"of max_num_batched_tokens={scheduler.max_num_batched_tokens} and "
        f"max_num_seqs={scheduler.max_num_seqs}"
    )
    lora = config.lora
    if lora.enable_lora:
        words += f" with max_loras={lora.max_loras} adapters of max_lora_rank={lora.max_lora_rank}"
    return words


def start_line(
    *,
    model: str,
    dtype: str,
    device: str,
    backend: str,
    plan: KVCachePlan,
    block_size: int,
    cache_dtype: str = "auto",
    num_threads: int | None = None,
    quantization: str | None = None,
    ranks: str = "",
) -> str:
    """Return the line that an engine logs when it starts.

    Parameters
    ----------
    model, dtype, device, backend : str
    plan : KVCachePlan
    block_size : int
        Tokens per block.
    cache_dtype : str
        What was asked for by ``kv_cache_dtype``; ``"auto"`` goes without saying.
    num_threads : int, optional
        Threads on a CPU.
    quantization : str, optional
        What the weights are quantized to.
    ranks : str
        How many processes compute it, in words.
    """
    weights = dtype if quantization is None else f"{dtype}, weights in {quantization},"
    of_dtype = "" if cache_dtype == "auto" else f"{cache_dtype}, "
    threads = f" ({num_threads} threads{' each' if ranks else ''})" if num_threads else ""
    of_ranks = f"{device}, {ranks}" if ranks else device
    return (
        f"{model}: {weights} on {of_ranks}{threads}, {backend} kernels; KV cache of {of_dtype}"
        f"{plan.num_blocks - 1} blocks of {block_size} tokens, room for {plan.num_full_requests} "
        f"requests of the full {plan.max_model_len} tokens"
    )
