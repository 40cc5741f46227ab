"""What a step computes, it computes by `quire.kernels`, and for all its sequences at once."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import quire.assembly
import quire.executor.shard
from quire import LLM, SamplingParams
from quire.kernels import get_backend

# Operations that a device may have a kernel for. What is left to plain torch is arithmetic of
# single elements (residual sums, scales, soft-caps of logits), views and indices.
KERNELS = {
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_softmax", "_log_softmax", "logsumexp",
    "native_layer_norm", "rsqrt", "var_mean", "embedding", "silu", "gelu", "relu", "sigmoid",
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "argmax",
    "sort", "topk", "multinomial", "cumsum", "index_copy", "scatter_add",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _reference_kernels(monkeypatch):
    """Operation by operation: natively, a step is one call."""
    monkeypatch.setenv("QUIRE_KERNELS", "reference")


class Watched:
    """A backend that knows when one of its operations runs."""

    def __init__(self, backend):
        self._backend = backend
        self.depth = 0

    def __getattr__(self, name):
        value = getattr(self._backend, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def operation(*args, **kwargs):
            self.depth += 1
            try:
                return value(*args, **kwargs)
            finally:
                self.depth -= 1

        return operation


class Counting(TorchDispatchMode):
    """Counts operations, by whether a kernel was running."""

    def __init__(self, kernels):
        super().__init__()
        self._kernels = kernels
        self.inside: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_") or func.overloadpacket.__name__
        (self.inside if self._kernels.depth else self.outside)[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """``watched(folder, **options)``: an LLM, and the counts of each of its steps."""

    def make(folder, **options):
        kernels = Watched(get_backend("cpu"))
        monkeypatch.setattr(quire.assembly, "get_backend", lambda device: kernels)
        monkeypatch.setattr(quire.executor.shard, "get_backend", lambda device: kernels)
        llm = LLM(folder, dtype="float32", **options)
        engine, steps = llm.llm_engine, []
        step = engine.step

        def counted():
            with Counting(kernels) as counts:
                outputs = step()
            steps.append(counts)
            return outputs

        engine.step = counted
        return llm, steps

    return make


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m", "mpt-6-heads", "falcon-40b"])
def test_every_operation_of_weight_is_one_of_the_backend(name, tiny_checkpoint, watched):
    """Model and sampler alike: another backend need not be looked for by anybody else."""
    llm, steps = watched(tiny_checkpoint(name))
    with llm:
        params = [
            SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1),
            SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, seed=1, max_tokens=4),
            SamplingParams(presence_penalty=1.0, repetition_penalty=1.2, logprobs=2, max_tokens=4),
            SamplingParams(n=2, use_beam_search=True, max_tokens=4),
        ]
        llm.generate([[5, 6, 7, 8]] * 4, params, use_tqdm=False)
    inside, outside = Counter(), Counter()
    for counts in steps:
        inside += counts.inside
        outside += counts.outside
    assert not KERNELS & set(outside), {name: outside[name] for name in KERNELS & set(outside)}
    assert len(KERNELS & set(inside)) > 2, "nothing was watched"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_is_as_many_operations_for_many_sequences_as_for_few(
    temperature, tiny_llama, watched
):
    """No loop over sequences or tokens: decoding 48 takes no more of them than decoding 3."""

    def operations_of_decoding(count):
        llm, steps = watched(tiny_llama, enable_prefix_caching=False)
        with llm:
            params = SamplingParams(
                temperature=temperature, seed=1, max_tokens=8, ignore_eos=True, top_k=9
            )
            prompts = [[5 + i, 6, 7] for i in range(count)]
            llm.generate(prompts, params, use_tqdm=False)
        return (steps[-1].inside + steps[-1].outside).total()

    assert operations_of_decoding(48) <= operations_of_decoding(3)


def test_a_prompt_is_as_many_operations_long_or_short(tiny_llama, watched):
    """No loop over tokens: a prompt of 200 in one step takes no more than one of 20."""

    def operations_of_prefill(length):
        llm, steps = watched(tiny_llama, max_num_batched_tokens=256)
        with llm:
            params = SamplingParams(temperature=0, max_tokens=1)
            llm.generate([[5] * length], params, use_tqdm=False)
        assert len(steps) == 1
        return (steps[0].inside + steps[0].outside).total()

    assert operations_of_prefill(200) <= operations_of_prefill(20)
