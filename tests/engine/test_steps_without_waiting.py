"""Between launching a step and collecting it, nothing asks the device for a value, or a shape."""

from __future__ import annotations

import pytest
import torch
from graphs import FOUND_ON_THE_HOST, FakeGraphs
from torch.utils._python_dispatch import TorchDispatchMode

import quire.assembly
import quire.engine.graphs
import quire.executor.shard
from quire import LLM, SamplingParams
from quire.engine.step_runner import StepRunner
from quire.kernels.triton.backend import TritonBackend
from quire.sampling import sampler
from quire.utils.transfers import upload

CPU = torch.device("cpu")
KINDS = [
    {"temperature": 0, "max_tokens": 9, "ignore_eos": True},
    {"temperature": 1, "top_p": 0.9, "logprobs": 2, "max_tokens": 6, "ignore_eos": True},
    {"temperature": 0.7, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "bad_words": ["the"],
     "min_tokens": 2, "max_tokens": 4},
    {"temperature": 1, "min_p": 0.1, "allowed_token_ids": list(range(20, 90)), "max_tokens": 3},
]  # fmt: skip
PROMPTS = [[5, 6, 7], [9] * 20, [3, 4], [8, 8, 8, 8, 1], [7]]


class Refusing(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if by_mask or name in FOUND_ON_THE_HOST:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_if_on_an_accelerator(monkeypatch):
    """Triton's kernels, graphs, and a sampler that believes that logits are on a device."""
    pytest.importorskip("triton")
    kernels, graphs = TritonBackend(), FakeGraphs()
    for module in (quire.assembly, quire.executor.shard):
        monkeypatch.setattr(module, "get_backend", lambda device: kernels)
    monkeypatch.setattr(quire.engine.graphs, "has_graphs", lambda device: True)
    monkeypatch.setattr(quire.assembly, "TorchGraphs", lambda device: graphs)
    monkeypatch.setattr(sampler, "upload", lambda arrays, device: upload(arrays, CPU))
    make = sampler.Sampler.__init__

    def make_elsewhere(self, **options):
        make(self, **{**options, "device": torch.device("cuda", 0)})

    monkeypatch.setattr(sampler.Sampler, "__init__", make_elsewhere)
    return graphs


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for the interpreter, on a CPU")
def test_overlapped_steps_by_graphs_wait_for_nothing(
    tiny_llama, as_if_on_an_accelerator, monkeypatch
):
    """Prefill, decode, and what choosing tokens takes; answers are those of plain steps."""
    graphs = as_if_on_an_accelerator
    params = [SamplingParams(seed=i, **kind) for i, kind in enumerate([*KINDS, KINDS[1]])]
    found = []

    def answers(**options):
        with LLM(
            str(tiny_llama), dtype="float32", max_model_len=32, block_size=4, **options
        ) as llm:
            prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            llm.llm_engine.check_integrity()
            found.append([output.outputs[0].token_ids for output in outputs])
            return llm.get_metrics()

    answers(num_gpu_blocks_override=40, enforce_eager=True, async_scheduling=False)
    assert not graphs.events
    for name in ("launch", "go_on"):
        plain = getattr(StepRunner, name)

        def refusing(self, part, plain=plain):
            with Refusing():
                return plain(self, part)

        monkeypatch.setattr(StepRunner, name, refusing)
    metrics = answers(
        num_gpu_blocks_override=9, max_num_seqs=4, async_scheduling=True, swap_space=0.01,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert found[0] == found[1]
    assert graphs.events.count("replay") > 5
    assert metrics["num_swapped_in"] > 0
