"""The KV cache's size follows one rule, and memory is counted within the cgroup."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import EngineConfig
from quire.errors import ConfigError, OutOfMemoryError
from quire.utils.memory import (
    CPU_CACHE_LIMIT,
    GIB,
    KVCachePlan,
    available_memory,
    format_bytes,
    plan_kv_cache,
    start_line,
)

MIB = 1 << 20


def write(root, **files):
    """Write files given as `dir__name="text"` under a fake root of the file system."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@given(
    block_size=st.integers(1, 64),
    max_num_seqs=st.integers(1, 64),
    bytes_per_block=st.integers(1, 64 * MIB),
    model_max_len=st.none() | st.integers(1, 1 << 20),
    free=st.integers(0, 64 * GIB),
)
def test_the_default_cache_is_the_least_of_three(
    block_size, max_num_seqs, bytes_per_block, model_max_len, free
):
    """Unasked, a CPU's cache is what all requests can use, 4 GiB, or 40% of what is free."""
    config = EngineConfig.create("m", block_size=block_size, max_num_seqs=max_num_seqs)
    budget = min(CPU_CACHE_LIMIT, int(0.4 * free)) // bytes_per_block
    if budget < 2:
        with pytest.raises(OutOfMemoryError, match="no room for the KV cache"):
            plan_kv_cache(
                config,
                bytes_per_block=bytes_per_block,
                model_max_len=model_max_len,
                free_bytes=free,
            )
        return
    plan = plan_kv_cache(
        config, bytes_per_block=bytes_per_block, model_max_len=model_max_len, free_bytes=free
    )
    usable = plan.num_blocks - 1
    if model_max_len is None:
        assert plan.num_blocks == budget
        assert plan.max_model_len == usable * block_size
    else:
        all_requests = max_num_seqs * math.ceil(model_max_len / block_size) + 1
        assert plan.num_blocks == min(budget, all_requests)
        assert plan.max_model_len == min(model_max_len, usable * block_size)
    # The longest request fits, as often as is said, and not once more.
    per_request = math.ceil(plan.max_model_len / block_size)
    assert plan.num_full_requests >= 1
    assert plan.num_full_requests * per_request <= usable
    assert (plan.num_full_requests + 1) * per_request > usable


@pytest.mark.parametrize(
    ("kwargs", "num_blocks"),
    [
        ({"num_gpu_blocks_override": 7}, 7),
        ({"kv_cache_memory_bytes": 9 * MIB + 5}, 9),
        ({"kv_cache_memory_bytes": 9 * MIB, "num_gpu_blocks_override": 5}, 5),
    ],
)
def test_a_size_that_was_asked_for_is_taken(kwargs, num_blocks):
    """Also where it is more than requests can use or than 40% of the memory."""
    config = EngineConfig.create("m", max_num_seqs=1, **kwargs)
    plan = plan_kv_cache(config, bytes_per_block=MIB, model_max_len=16, free_bytes=10 * MIB)
    assert plan == KVCachePlan(num_blocks, 16, num_blocks - 1)


def test_a_size_that_is_not_there_is_refused_with_numbers():
    for kwargs in ({"kv_cache_memory_bytes": 8 * GIB}, {"num_gpu_blocks_override": 8192}):
        config = EngineConfig.create("m", **kwargs)
        with pytest.raises(OutOfMemoryError, match=r"8\.00 GiB was asked for, and only 2\.00 GiB"):
            plan_kv_cache(config, bytes_per_block=MIB, model_max_len=16, free_bytes=2 * GIB)


def test_a_size_below_two_blocks_is_refused():
    config = EngineConfig.create("m", kv_cache_memory_bytes=MIB)
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes=1048576 is less"):
        plan_kv_cache(config, bytes_per_block=MIB, model_max_len=16, free_bytes=GIB)


def test_a_length_not_asked_for_shrinks_and_says_so(caplog):
    config = EngineConfig.create("m", num_gpu_blocks_override=5)
    with caplog.at_level(logging.WARNING, "quire"):
        plan = plan_kv_cache(config, bytes_per_block=MIB, model_max_len=4096, free_bytes=GIB)
    assert plan == KVCachePlan(5, 64, 1)
    [record] = caplog.records
    assert "max_model_len is 64 instead of the model's 4096 tokens" in record.getMessage()


def test_a_length_asked_for_is_honoured_or_refused(caplog):
    """Never shrunk: the numbers say what would fit, and how much the length would need."""
    config = EngineConfig.create("m", num_gpu_blocks_override=5, max_model_len=65)
    with pytest.raises(ConfigError, match=r"max_model_len=65 does not fit.* 64 tokens") as caught:
        plan_kv_cache(config, bytes_per_block=MIB, model_max_len=4096, free_bytes=GIB)
    needed = 6 * MIB
    assert f"kv_cache_memory_bytes to {needed}" in str(caught.value)
    config = EngineConfig.create("m", kv_cache_memory_bytes=needed, max_model_len=65)
    plan = plan_kv_cache(config, bytes_per_block=MIB, model_max_len=4096, free_bytes=GIB)
    assert plan == KVCachePlan(6, 65, 1)
    assert not caplog.records


def test_a_length_past_the_models_own_is_refused():
    config = EngineConfig.create("m", max_model_len=4097)
    with pytest.raises(ConfigError, match="max_model_len=4097 is more than the 4096 positions"):
        plan_kv_cache(config, bytes_per_block=1024, model_max_len=4096, free_bytes=GIB)
    plan = plan_kv_cache(config, bytes_per_block=1024, model_max_len=None, free_bytes=GIB)
    assert plan.max_model_len == 4097


def test_a_gpus_cache_is_what_the_utilization_leaves():
    """Weights are loaded by then, so they count as taken."""
    config = EngineConfig.create("m", gpu_memory_utilization=0.75, max_num_seqs=60000)
    plan = plan_kv_cache(
        config, bytes_per_block=MIB, model_max_len=4096, free_bytes=20 * GIB, total_bytes=24 * GIB
    )
    assert plan.num_blocks * MIB == 14 * GIB
    with pytest.raises(OutOfMemoryError):
        plan_kv_cache(
            config, bytes_per_block=MIB, model_max_len=1, free_bytes=GIB, total_bytes=24 * GIB
        )


MEMINFO = "MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable:   16000000 kB\n"


def test_memory_without_cgroups_is_what_the_system_has(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO)
    assert available_memory(tmp_path) == 16000000 * 1024


def test_memory_in_a_version_2_group_is_what_every_level_has_left(tmp_path):
    """The parent's limit binds too; page cache can be had, mapped files cannot."""
    write(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/a/b\n",
        sys__fs__cgroup__a__b__memory_DOT_max="max\n",
        sys__fs__cgroup__a__b__memory_DOT_current="500\n",
        sys__fs__cgroup__a__memory_DOT_max="100000\n",
        sys__fs__cgroup__a__memory_DOT_current="70000\n",
        sys__fs__cgroup__a__memory_DOT_stat=(
            "anon 1\ninactive_file 10000\nactive_file 5000\nfile_mapped 3000\n"
        ),
    )
    assert available_memory(tmp_path) == 100000 - 70000 + 10000 + 5000 - 3000


def test_memory_in_a_container_whose_group_is_named_as_the_host_sees_it(tmp_path):
    """Only the top of the group is mounted: its files are those at the mount."""
    write(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="100000\n",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes="60000\n",
        sys__fs__cgroup__memory__memory_DOT_stat=(
            "inactive_file 1\ntotal_inactive_file 10000\ntotal_active_file 0\n"
            "total_mapped_file 20000\n"
        ),
    )
    assert available_memory(tmp_path) == 40000


def test_a_full_group_has_nothing_left_and_an_unlimited_one_does_not_bind(tmp_path):
    write(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="4:memory:/\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes="60000\n",
    )
    assert available_memory(tmp_path) == 16000000 * 1024
    write(tmp_path, sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="50000\n")
    assert available_memory(tmp_path) == 0


def test_this_machine_has_memory():
    assert 0 < available_memory() < 1 << 50


def test_sizes_are_readable():
    assert format_bytes(300) == "300 bytes"
    assert format_bytes(12 * MIB) == "12.0 MiB"
    assert format_bytes(1.5 * GIB) == "1.50 GiB"


def test_the_start_line_is_one_line_with_all_that_was_decided():
    line = start_line(
        model="quire/demo",
        dtype="bfloat16",
        device="cpu",
        backend="reference",
        plan=KVCachePlan(num_blocks=101, max_model_len=160, num_full_requests=10),
        block_size=16,
        num_threads=2,
    )
    assert "\n" not in line
    for part in ("quire/demo", "bfloat16", "cpu", "reference", "100 blocks", "10 requests", "160"):
        assert part in line


def test_the_start_line_names_a_cache_dtype_that_was_asked_for():
    """Of a cache that is as the model is, nothing is said."""
    plan = KVCachePlan(num_blocks=101, max_model_len=160, num_full_requests=10)
    about = {"model": "m", "dtype": "bfloat16", "device": "cpu", "backend": "cpu", "plan": plan}
    assert "KV cache of 100 blocks" in start_line(**about, block_size=16)
    line = start_line(**about, block_size=16, cache_dtype="fp8")
    assert "KV cache of fp8, 100 blocks" in line
