"""Steps of one token per sequence go by graphs: of a few sizes, recorded when they first come."""

from __future__ import annotations

import logging

import pytest
import torch
from graphs import FakeGraphs, StaticBackend

import quire.assembly
import quire.engine.graphs
import quire.executor.shard
from quire import LLM, SamplingParams
from quire.config import EngineConfig
from quire.engine.batch import ForwardBatch
from quire.engine.graphs import LARGEST, TorchGraphs, graph_sizes, why_eager
from quire.engine.runner import ModelRunner
from quire.kernels import get_backend
from quire.kernels.attention.choice import records_decode
from quire.kernels.triton.backend import TritonBackend
from quire.models.hf_config import read_config
from quire.models.loader import load_model

CPU = torch.device("cpu")
BLOCK = 4
MAX_LEN = 64


def load(folder, kernels):
    return load_model(folder, read_config(folder), device=CPU, dtype=torch.float32, kernels=kernels)


class Pair:
    """Two runners of one model, one of them with graphs, that are given the same steps."""

    def __init__(self, folder, *, max_num_seqs=12, fail=None, kernels=None):
        self.kernels = kernels or StaticBackend()
        self.device = FakeGraphs(fail)
        self.num_blocks = 1 + 16 * max_num_seqs
        model = load(folder, self.kernels)
        self.eager, self.graphed = (
            ModelRunner(
                model, self.kernels, num_blocks=self.num_blocks, block_size=BLOCK,
                kv_cache_dtype=torch.float32, device=CPU,
            )
            for _ in range(2)
        )  # fmt: skip
        self.graphed.use_graphs(self.device, max_num_seqs=max_num_seqs, max_model_len=MAX_LEN)
        self.graphs = self.graphed.graphs
        self.lengths = {}
        generator = torch.Generator().manual_seed(0)
        self.tables = torch.randperm(self.num_blocks - 1, generator=generator)[: 16 * max_num_seqs]
        self.tables = (self.tables + 1).view(max_num_seqs, 16).int()

    def batch(self, work, **others):
        """A step: ``{sequence: number of tokens}``."""
        ids, positions, slots, lens, starts = [], [], [], [], [0]
        for seq, count in work.items():
            first = self.lengths.get(seq, 0)
            self.lengths[seq] = first + count
            for position in range(first, first + count):
                ids.append(5 + (7 * seq + 3 * position) % 200)
                positions.append(position)
                block = int(self.tables[seq, position // BLOCK])
                slots.append(block * BLOCK + position % BLOCK)
            lens.append(first + count)
            starts.append(len(ids))
        width = -(-max(lens) // BLOCK)
        return ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=self.tables[list(work), :width],
            slot_mapping=torch.tensor(slots),
            logits_indices=torch.arange(len(ids)),
            **others,
        )

    def step(self, work):
        """Give both the same step, and see that they agree; return what happened of graphs."""
        before = len(self.device.events)
        batch = self.batch(work)
        expected = self.eager.forward(batch)
        batch.attention = None
        hidden = self.graphed.forward(batch)
        assert hidden.shape == expected.shape
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-4)
        for (keys, values), (own_keys, own_values) in zip(
            self.eager._kv_caches, self.graphed._kv_caches, strict=True
        ):
            torch.testing.assert_close(own_keys, keys, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(own_values, values, rtol=1e-3, atol=1e-4)
            assert not own_keys[0].any(), "the null block was written to"
        return self.device.events[before:]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "opt-350m", "mpt-6-heads"])
def test_steps_by_graphs_are_those_without(name, tiny_checkpoint):
    """Sequences come and go and grow past blocks; sizes are recorded once, and then given again."""
    pair = Pair(tiny_checkpoint(name))
    assert pair.step({0: 5, 1: 9, 2: 3}) == []
    assert pair.step({0: 1, 1: 1, 2: 1}) == ["capture"]
    assert pair.step({0: 1, 1: 1, 2: 1}) == ["replay"]
    assert pair.step({2: 1, 0: 1, 1: 1, 3: 1}) == ["replay"]  # also by one of its own size
    assert pair.step({1: 1}) == ["capture"]
    assert pair.step({4: 2, 5: 7, 1: 1}) == []
    assert pair.step(dict.fromkeys((5, 4, 3, 2, 1, 0), 1)) == ["capture"]
    for _ in range(8):
        assert pair.step(dict.fromkeys((0, 1, 2, 3, 5), 1)) == ["replay"]
        assert pair.step({3: 1}) == ["replay"]
    assert pair.step({5: 1, 2: 1}) == ["capture"]
    assert pair.graphs.recorded_sizes == [1, 2, 4, 8]


@pytest.mark.slow
@pytest.mark.skipif(
    not records_decode(TritonBackend()), reason="Triton's attention has no plans that are recorded"
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for the interpreter, on a CPU")
def test_steps_by_graphs_with_tritons_attention(tiny_llama):
    """In its interpreter, so few of them."""
    pytest.importorskip("triton")
    pair = Pair(tiny_llama, max_num_seqs=4, kernels=TritonBackend())
    assert pair.step({0: 5, 1: 9}) == []
    assert pair.step({0: 1, 1: 1}) == ["capture"]
    assert pair.step({1: 1, 0: 1}) == ["replay"]
    assert pair.step({1: 1}) == ["capture"]
    assert pair.step({0: 1}) == ["replay"]


def test_sizes_are_few_and_end_at_what_can_come():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 50]
    assert graph_sizes(4096)[-2:] == [LARGEST - 8, LARGEST]


def test_what_is_no_batch_of_single_tokens_goes_without(tiny_llama):
    pair = Pair(tiny_llama, max_num_seqs=6)
    graphs = pair.graphs
    assert graphs.takes(pair.batch({0: 1, 1: 1}))
    assert not graphs.takes(pair.batch({0: 1, 1: 2}))
    adapted = pair.batch({0: 1}, adapter_slots=torch.tensor([0], dtype=torch.int32))
    assert not graphs.takes(adapted)
    wide = pair.batch({0: 1})
    wide.block_tables = torch.zeros(1, 17, dtype=torch.int32)
    assert not graphs.takes(wide)
    of_three = pair.batch({0: 1})
    of_three.positions = of_three.positions.expand(3, -1)
    assert not graphs.takes(of_three)


def test_nothing_that_a_graph_reads_ever_moves(tiny_llama):
    """Tables of positions reach to the end before, and inputs and plans are written in place."""
    pair = Pair(tiny_llama)
    tables = pair.graphed.model._tables[0]
    places = [each.data_ptr() for each in tables.reserve(0)]
    pair.step({0: 1, 1: 1})
    static = pair.kernels.plans[0]
    kept = (static.seq_lens.data_ptr(), static.tables.data_ptr())
    for _ in range(MAX_LEN - 1):
        pair.step({0: 1, 1: 1})
    assert [each.data_ptr() for each in tables.reserve(MAX_LEN)] == places
    assert (static.seq_lens.data_ptr(), static.tables.data_ptr()) == kept
    assert len(pair.kernels.plans) == 1


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (torch.OutOfMemoryError("no 3 GiB"), "no 3 GiB; lower gpu_memory_utilization"),
        (RuntimeError("not permitted\nmore lines"), "RuntimeError: not permitted"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_cannot_be_recorded_runs_all_the_same(fail, words, tiny_llama, caplog):
    pair = Pair(tiny_llama, fail=fail)
    with caplog.at_level(logging.WARNING, "quire"):
        pair.step({0: 1, 1: 1})
        pair.step({0: 1, 1: 1})
        pair.step({0: 1})
    [record] = caplog.records
    assert record.getMessage().startswith("no graphs: a step of 2 sequences could not be recorded")
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not pair.graphs.is_on


def test_sizes_that_were_recorded_before_a_failure_are_still_used(tiny_llama, caplog):
    pair = Pair(tiny_llama)
    pair.step({0: 1, 1: 1})
    pair.device.fail = torch.OutOfMemoryError("full")
    with caplog.at_level(logging.WARNING, "quire"):
        assert pair.step(dict.fromkeys(range(5), 1)) == []
        assert pair.step(dict.fromkeys(range(5), 1)) == []
    assert len(caplog.records) == 1
    assert pair.step({0: 1, 1: 1}) == ["replay"]
    assert pair.step({1: 1}) == ["replay"], "padded up to what there is"


def test_a_model_that_waits_for_the_device_is_found_out(tiny_checkpoint, caplog):
    """By the device, should nobody have known before."""
    pair = Pair(tiny_checkpoint("mixtral"))
    assert pair.graphed.model.waits_for_device
    pair.step({0: 3, 1: 2})
    with caplog.at_level(logging.WARNING, "quire"):
        assert pair.step({0: 1, 1: 1}) == []
    assert "not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "name", "kernels", "why"),
    [
        ({}, "llama", StaticBackend(), None),
        ({"enforce_eager": True}, "llama", StaticBackend(), "enforce_eager=True"),
        ({"tensor_parallel_size": 2}, "llama", StaticBackend(), "several ranks"),
        ({}, "llama", get_backend("cpu", "reference"), "reference kernels read"),
        ({}, "mixtral", StaticBackend(), "mixtures of experts by the static kernels wait"),
    ],
)
def test_why_no_step_is_recorded(arguments, name, kernels, why, tiny_checkpoint, monkeypatch):
    model = load(tiny_checkpoint(name), kernels)
    config = EngineConfig.create("m", **arguments)
    assert (
        "no graphs of devices" in (why_eager(config, model, kernels, CPU) or "")
        or config.enforce_eager
    )
    monkeypatch.setattr(quire.engine.graphs, "has_graphs", lambda device: True)
    reason = why_eager(config, model, kernels, CPU)
    assert reason is None if why is None else why in reason


def test_answers_are_the_same_by_graphs(tiny_llama, monkeypatch):
    """A whole engine, with requests that come, end and are preempted."""
    kernels, device = StaticBackend(), FakeGraphs()
    monkeypatch.setattr(quire.assembly, "get_backend", lambda device: kernels)
    monkeypatch.setattr(quire.executor.shard, "get_backend", lambda device: kernels)
    monkeypatch.setattr(quire.engine.graphs, "has_graphs", lambda device: True)
    monkeypatch.setattr(quire.assembly, "TorchGraphs", lambda _: device)
    params = [
        SamplingParams(temperature=0, max_tokens=4 + 5 * i, ignore_eos=True, logprobs=1 + i % 2)
        for i in range(7)
    ]
    params[3] = SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5 + i, *range(6, 7 + 3 * i)]} for i in range(7)]
    found = []
    for eager in (True, False):
        with LLM(
            str(tiny_llama), dtype="float32", enforce_eager=eager, max_num_seqs=6,
            block_size=4, num_gpu_blocks_override=40, max_model_len=100,
        ) as llm:  # fmt: skip
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([[list(c.token_ids) for c in output.outputs] for output in outputs])
        if eager:
            assert not device.events
    assert found[0] == found[1]
    assert device.events.count("replay") > 20
    assert device.events.count("capture") <= 4


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_a_device_records_and_goes_on_after_a_failure():
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    graphs = TorchGraphs(device)
    x, y = torch.arange(4.0, device=device), torch.zeros(4, device=device)
    stream = torch.accelerator.current_stream()

    def run():
        y.copy_(x * 2 + 1)

    run()
    graph = graphs.capture(run)
    x.fill_(3.0)
    graph.replay()
    assert y.tolist() == [7.0] * 4
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: x.sum().item())
    assert torch.accelerator.current_stream() == stream
    run()
    other = graphs.capture(run)
    x.fill_(1.0)
    other.replay()
    graph.replay()
    assert y.tolist() == [3.0] * 4


class OfADevice:
    """Its module in torch, as far as sleep needs it."""

    def __init__(self, runner):
        self.runner = runner
        self.found = []

    def empty_cache(self):
        self.found.append((self.runner.graphs, list(self.runner._kv_caches)))


def test_what_sleep_lets_go_is_given_back_by_torch_too(tiny_llama, monkeypatch):
    """Else an accelerator's memory stays taken, and no other process finds it."""
    runner = Pair(tiny_llama, max_num_seqs=2).graphed
    module = OfADevice(runner)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    runner.device = torch.device("cuda", 0)
    runner.sleep()
    assert module.found == [(None, [])]
