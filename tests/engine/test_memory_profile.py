"""The largest step is computed before the KV cache is sized, which has what that one leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from graphs import StaticBackend
from hypothesis import given
from hypothesis import strategies as st

import quire.executor.shard
import quire.utils.out_of_memory
from quire.assembly import _largest_step
from quire.config import EngineConfig
from quire.engine.graphs import graph_sizes
from quire.engine.memory_profile import (
    GRAPH_BYTES,
    StepSize,
    TorchMemory,
    largest_batch,
    measure_step,
)
from quire.errors import OutOfMemoryError
from quire.executor.shard import describe
from quire.kernels import get_backend
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.utils.memory import GIB, plan_kv_cache
from quire.utils.out_of_memory import named_out_of_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
MIB = 1 << 20


class FakeMemory:
    """Memory of a device whose steps take so much."""

    def __init__(self, *peaks):
        self.peaks = list(peaks)
        self.events = []

    def begin(self):
        self.events.append("begin")

    def peak(self):
        self.events.append("peak")
        return self.peaks.pop(0)

    def give_back(self):
        self.events.append("give back")


def load(folder, kernels):
    return load_model(folder, read_config(folder), device=CPU, dtype=torch.float32, kernels=kernels)


def size_of(**fields):
    fields = {
        "num_tokens": 48, "num_seqs": 5, "max_len": 100, "block_size": 16,
        "kv_cache_dtype": "float32", **fields,
    }  # fmt: skip
    return StepSize(**fields)


@given(
    num_tokens=st.integers(1, 300),
    num_seqs=st.integers(1, 20),
    max_len=st.integers(1, 400),
    block_size=st.integers(1, 32),
)
def test_the_largest_step_has_all_tokens_and_the_longest_sequence(
    num_tokens, num_seqs, max_len, block_size
):
    size = size_of(
        num_tokens=num_tokens,
        num_seqs=min(num_seqs, num_tokens),
        max_len=max_len,
        block_size=block_size,
    )
    batch = largest_batch(size, CPU)
    counts = batch.query_start_loc.diff()
    assert batch.num_seqs <= size.num_seqs
    assert counts.sum() == batch.num_tokens <= num_tokens
    if size.num_seqs * max_len >= num_tokens + max_len:
        assert batch.num_tokens == num_tokens
    assert batch.seq_lens.max() <= max_len
    if size.num_seqs > 1:
        assert batch.seq_lens.max() == max_len
    # Each token has a slot of its own, which is where its sequence's table says.
    slots = batch.slot_mapping.tolist()
    assert len(set(slots)) == len(slots)
    assert min(slots) >= block_size, "the null block is not written"
    token = 0
    for row, (count, end) in enumerate(zip(counts.tolist(), batch.seq_lens.tolist(), strict=True)):
        for position in range(end - count, end):
            assert batch.positions[token] == position
            block = int(batch.block_tables[row, position // block_size])
            assert slots[token] == block * block_size + position % block_size
            token += 1


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "opt-350m", "mpt-6-heads"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_step_is_measured_with_what_is_chosen_from_it(name, dtype, tiny_checkpoint):
    kernels = get_backend("cpu", "reference")
    model = load(tiny_checkpoint(name), kernels)
    memory = FakeMemory(3 * MIB)
    measured = measure_step(model, kernels, size_of(kv_cache_dtype=dtype), memory, CPU)
    assert measured == 3 * MIB
    assert memory.events == ["begin", "peak", "give back"]


def test_graphs_take_what_they_compute_in_besides(tiny_llama):
    kernels = StaticBackend()
    model = load(tiny_llama, kernels)
    memory = FakeMemory(3 * MIB, 2 * MIB)
    size = size_of(has_graphs=True, num_seqs=12)
    measured = measure_step(model, kernels, size, memory, CPU)
    tables = 4 * 7 * sum(graph_sizes(12))
    assert measured == 5 * MIB + len(graph_sizes(12)) * GRAPH_BYTES + tables
    assert memory.events == ["begin", "peak", "begin", "peak", "give back"]


def test_the_cache_is_what_weights_and_the_largest_step_leave():
    config = EngineConfig.create("m", gpu_memory_utilization=0.5, max_num_seqs=60000)
    memory = {"bytes_per_block": MIB, "free_bytes": 7 * GIB, "total_bytes": 8 * GIB}
    plain = plan_kv_cache(config, model_max_len=1024, **memory)
    beside = plan_kv_cache(config, model_max_len=1024, step_bytes=GIB, **memory)
    assert plain.num_blocks == 3 * 1024
    assert beside.num_blocks == 2 * 1024


def test_no_room_for_a_cache_is_said_with_all_numbers():
    config = EngineConfig.create("m", gpu_memory_utilization=0.5, max_num_seqs=7)
    with pytest.raises(OutOfMemoryError) as caught:
        plan_kv_cache(
            config,
            bytes_per_block=MIB,
            model_max_len=1024,
            free_bytes=5 * GIB,
            total_bytes=8 * GIB,
            step_bytes=GIB,
        )
    for part in (
        "gpu_memory_utilization=0.5 lets 4.00 GiB of 8.00 GiB",
        "take 3.00 GiB",
        "max_num_batched_tokens=512 and max_num_seqs=7 takes 1.00 GiB",
        "max_model_len",
        "quantization=",
        "tensor_parallel_size",
    ):
        assert part in str(caught.value)


def test_no_room_beside_adapters_names_them():
    config = EngineConfig.create("m", enable_lora=True, max_loras=900)
    memory = {"bytes_per_block": MIB, "free_bytes": GIB, "total_bytes": 8 * GIB}
    with pytest.raises(OutOfMemoryError, match=r"with max_loras=900 adapters of max_lora_rank=64"):
        plan_kv_cache(config, model_max_len=1024, step_bytes=GIB, **memory)


def test_a_cache_that_was_asked_for_leaves_room_for_a_step():
    config = EngineConfig.create("m", kv_cache_memory_bytes=2 * GIB)
    memory = {"bytes_per_block": MIB, "free_bytes": 3 * GIB, "total_bytes": 8 * GIB}
    plan_kv_cache(config, model_max_len=1024, step_bytes=GIB, **memory)
    with pytest.raises(OutOfMemoryError, match=r"only 3\.00 GiB .*takes 1\.50 GiB; ask for less"):
        plan_kv_cache(config, model_max_len=1024, step_bytes=3 * GIB // 2, **memory)


def test_memory_that_ends_is_said_with_what_there_is(monkeypatch):
    monkeypatch.setattr(
        quire.utils.out_of_memory, "memory_info", lambda device: (GIB // 2, 8 * GIB)
    )
    text = r"no memory for the cake \(512\.0 MiB of the 8\.00 GiB of cuda:0 are free\): eat less"
    with pytest.raises(OutOfMemoryError, match=text + r" \(tried to allocate\)$"):  # noqa: SIM117
        with named_out_of_memory("the cake", GPU, "eat less"):
            raise torch.OutOfMemoryError("tried to allocate\nand more")
    with pytest.raises(OutOfMemoryError, match=text + "$"):  # noqa: SIM117
        with named_out_of_memory("the cake", GPU, "eat less"):
            raise MemoryError
    known = r"^no room for x \(512\.0 MiB .* free\): eat less$"
    with pytest.raises(OutOfMemoryError, match=known):  # noqa: SIM117
        with named_out_of_memory("the cake", GPU, "eat less"):
            raise OutOfMemoryError("no room for x")
    with pytest.raises(OutOfMemoryError, match=r"^as it was$"):  # noqa: SIM117
        with named_out_of_memory("the cake", CPU, "eat less"):
            raise OutOfMemoryError("as it was")


def test_there_is_room_for_adapters_in_all_slots(tiny_llama):
    """They come later, when the KV cache has the rest."""
    kernels = get_backend("cpu", "reference")
    folder, memory = tiny_llama, [FakeMemory(7 * MIB), FakeMemory(7 * MIB)]
    model = load_model(
        folder, read_config(folder), device=CPU, dtype=torch.float32, kernels=kernels,
        max_adapters=3,
    )  # fmt: skip
    without = measure_step(model, kernels, size_of(), memory[0], CPU)
    slots = {"max_adapters": 3, "adapter_rank": 8, "adapter_dtype": "bfloat16"}
    taken = measure_step(model, kernels, size_of(**slots), memory[1], CPU) - without
    matrices = 0
    for linear in model.linears().values():
        for outputs in linear.parts.values():
            matrices += torch.zeros(8, linear.in_features, dtype=torch.bfloat16).nbytes
            matrices += torch.zeros(outputs, 8, dtype=torch.bfloat16).nbytes
    assert taken == 3 * matrices > 0


def test_what_adapters_may_take_is_known_before_the_cache():
    config = EngineConfig.create(
        "m", max_model_len=64, enable_lora=True, max_loras=2, max_lora_rank=16
    )
    step = _largest_step(config, {}, torch.bfloat16)
    assert StepSize(**step).max_adapters == 2
    assert (step["adapter_rank"], step["adapter_dtype"]) == (16, "bfloat16")
    assert "adapter_rank" not in _largest_step(
        EngineConfig.create("m", max_model_len=64), {}, torch.bfloat16
    )


def test_a_rank_on_a_device_says_what_its_step_takes(tiny_llama, monkeypatch):
    """And ends with advice where there is no memory for that."""
    model = load(tiny_llama, get_backend("cpu", "reference"))
    monkeypatch.setattr(quire.executor.shard, "memory_info", lambda device: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(quire.utils.out_of_memory, "memory_info", lambda device: (GIB, 8 * GIB))
    monkeypatch.setattr(quire.executor.shard, "TorchMemory", lambda device: FakeMemory(7 * MIB))
    step = {
        "num_tokens": 48, "num_seqs": 5, "max_len": 100, "block_size": 16,
        "kv_cache_dtype": "float32",
    }  # fmt: skip
    measure = quire.executor.shard.measure_step
    monkeypatch.setattr(
        quire.executor.shard,
        "measure_step",
        lambda model, kernels, size, memory, device: measure(model, kernels, size, memory, CPU),
    )
    settings = SimpleNamespace(step=step, kernels=lambda _: get_backend("cpu", "reference"))
    described = describe(model, GPU, settings)
    assert described["step_bytes"] == 7 * MIB
    assert (described["free_bytes"], described["total_bytes"]) == (5 * GIB, 8 * GIB)
    assert describe(model, CPU)["step_bytes"] == 0

    def fail(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(quire.executor.shard, "measure_step", fail)
    with pytest.raises(OutOfMemoryError, match=r"48 tokens and 5 seq.*max_num_batched_tokens=48"):
        describe(model, GPU, settings)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_a_device_counts_what_tensors_take_at_most():
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    memory = TorchMemory(device)
    kept = torch.zeros(MIB, device=device)
    memory.begin()
    for _ in range(3):
        torch.zeros(4 * MIB, device=device)
    assert 16 * MIB <= memory.peak() < 20 * MIB
    memory.give_back()
    assert not kept.any()
