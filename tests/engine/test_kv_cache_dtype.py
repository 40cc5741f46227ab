"""kv_cache_dtype: what it saves, that answers stay what they are, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from isas import instruction_sets, rounds_activations

from quire import LLM, SamplingParams
from quire.assembly import choose_kv_cache_dtype
from quire.config import EngineConfig
from quire.engine.runner import kv_bytes_per_block
from quire.errors import ConfigError, NotSupportedError
from quire.kernels import get_backend

IN_CODES = ["fp8", "int8"]
is_native = pytest.mark.skipif(
    get_backend("cpu").name != "cpu", reason="the native kernels promise it"
)

WAYS = {
    "together": {},
    "in chunks of 7": {"max_num_batched_tokens": 7, "block_size": 4},
    "scarce blocks": {"block_size": 4, "num_gpu_blocks_override": 24},
}


def answers(llm: LLM) -> list[list[tuple[int, float]]]:
    """Tokens with their log-probabilities, of prompts with and without a common beginning."""
    rng = random.Random(0)
    common = [rng.randrange(5, 250) for _ in range(21)]
    prompts = [[rng.randrange(5, 250) for _ in range(rng.choice([1, 8, 30]))] for _ in range(10)]
    prompts = [common + own if i % 3 else own for i, own in enumerate(prompts)]
    params = [
        SamplingParams(
            temperature=i % 2, seed=i, logprobs=0, max_tokens=rng.choice([5, 26]), ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    chosen = [output.outputs[0] for output in outputs]
    return [
        [(i, step[i].logprob) for i, step in zip(each.token_ids, each.logprobs, strict=True)]
        for each in chosen
    ]


@is_native
@pytest.mark.parametrize("cache", [*IN_CODES, "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logprobs_have_the_same_bits_however_requests_are_run(isa, tiny_checkpoint, name, cache):
    """Chunks, company, cached prefixes and preemption change nothing, in codes of every type."""

    def run(**options):
        options = {"max_model_len": 80, "dtype": "float32", "kv_cache_dtype": cache, **options}
        with LLM(tiny_checkpoint(name), **options) as llm:
            found = answers(llm)
            return found, llm.get_metrics()

    expected, _ = run(max_num_seqs=1, enable_prefix_caching=False)
    for way, options in WAYS.items():
        found, metrics = run(**options)
        assert found == expected, way
        assert metrics["num_preemptions"] > 0 or way != "scarce blocks"
        assert metrics["num_cached_tokens"] > 0


@pytest.mark.parametrize("cache", IN_CODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_are_the_same_by_operations_in_any_company(monkeypatch, tiny_llama, cache, dtype):
    """Where the native kernels do not run, tokens do not depend on how requests are run."""
    monkeypatch.setenv("QUIRE_KERNELS", "reference")
    results = []
    for options in ({"max_num_seqs": 1}, WAYS["in chunks of 7"], WAYS["scarce blocks"]):
        options = {"max_model_len": 80, **options}
        with LLM(tiny_llama, dtype=dtype, kv_cache_dtype=cache, **options) as llm:
            results.append([[i for i, _ in each] for each in answers(llm)])
    if dtype == "float32":
        assert results[1:] == results[:1] * 2
    else:  # where products are rounded by float16 and by shape
        same = [a == b for one in results[1:] for a, b in zip(one, results[0], strict=True)]
        assert sum(same) >= len(same) * 0.8


@is_native
@pytest.mark.parametrize("cache", IN_CODES)
def test_native_and_reference_kernels_agree(monkeypatch, tiny_llama, cache):
    """Log-probabilities of the same tokens differ by float rounding, and a code here and there."""
    prompt = [random.Random(1).randrange(5, 250) for _ in range(60)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for kernels in ("reference", "cpu"):
        monkeypatch.setenv("QUIRE_KERNELS", kernels)
        with LLM(tiny_llama, dtype="float32", kv_cache_dtype=cache) as llm:
            [output] = llm.generate([prompt], params, use_tqdm=False)
        steps = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found.append(torch.tensor([step[i].logprob for i, step in steps]))
    # Tiles take what keys, values and queries stand for as bfloat16.
    atol = 2e-2 if rounds_activations(instruction_sets()[0]) else 2e-3
    torch.testing.assert_close(*found, atol=atol, rtol=0)


QUESTIONS = [
    "The capital of France is",
    "The capital of Japan is",
    "Once upon a time",
    "The opposite of hot is",
    "Two plus two is",
    "A dog is an animal that",
]


@pytest.mark.parametrize(("cache", "least"), [("int8", 0.8), ("fp8", 0.6)])
def test_greedy_texts_of_the_demo_model_stay_close(cache, least):
    """Most tokens before a text first differs from that of a cache as the model is."""
    params = SamplingParams(temperature=0, max_tokens=24)
    texts = []
    for kv_cache_dtype in ("auto", cache):
        with LLM("quire/demo", kv_cache_dtype=kv_cache_dtype) as llm:
            outputs = llm.generate(QUESTIONS, params, use_tqdm=False)
        texts.append([output.outputs[0].token_ids for output in outputs])
    same = total = 0
    for ours, plain in zip(*texts, strict=True):
        pairs = [a == b for a, b in zip(ours, plain, strict=False)]
        same += [*pairs, False].index(False)
        total += len(plain)
    assert same >= least * total


@pytest.mark.parametrize(
    ("cache", "dtype", "width"), [("auto", "float32", 64), ("fp8", "bfloat16", 20)]
)
def test_the_number_of_blocks_is_that_of_what_a_row_takes(tiny_llama, cache, dtype, width):
    """The same memory holds as many blocks more as a row is shorter; start and map say what of."""
    with LLM(
        tiny_llama, dtype=dtype, kv_cache_dtype=cache, kv_cache_memory_bytes=1 << 20, block_size=8
    ) as llm:
        mapped = llm.kv_cache_map()
        # Two layers, keys and values, 2 heads of 16.
        assert len(mapped.blocks) + 1 == (1 << 20) // (2 * 2 * 2 * 8 * width)
        assert mapped.dtype == cache
        assert ("in fp8" in repr(mapped)) is (cache == "fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_bytes_of_a_block_are_those_that_are_allocated(dtype):
    """What memory is planned by is what the kernels take."""

    class Model:
        @staticmethod
        def kv_cache_layers():
            return [(2, 16), (3, 20)]

    taken = sum(
        cache.nbytes
        for heads, dim in Model.kv_cache_layers()
        for cache in get_backend("cpu").allocate_kv_cache(
            5, 4, heads, dim, dtype, torch.device("cpu")
        )
    )
    assert 5 * kv_bytes_per_block(Model.kv_cache_layers(), 4, dtype) == taken


def test_names_of_the_cache_dtype():
    """Aliases mean the same, and torch's own types are taken."""
    for name, kept in {
        "fp8_e4m3": "fp8",
        torch.float8_e4m3fn: "fp8",
        torch.int8: "int8",
        "half": "float16",
        torch.bfloat16: "bfloat16",
    }.items():
        assert EngineConfig.create("m", kv_cache_dtype=name).cache.kv_cache_dtype == kept
    assert choose_kv_cache_dtype("auto", torch.bfloat16) is torch.bfloat16
    assert choose_kv_cache_dtype("fp8", torch.bfloat16) is torch.float8_e4m3fn
    assert choose_kv_cache_dtype("float32", torch.bfloat16) is torch.float32


@pytest.mark.parametrize("name", ["fp8_e5m2", "fp8_inc", "fp8_ds_mla"])
def test_other_kinds_of_fp8_are_refused_with_what_is_right(name):
    with pytest.raises(NotSupportedError, match=rf"kv_cache_dtype='{name}'.*use 'fp8', which"):
        EngineConfig.create("m", kv_cache_dtype=name)


@is_native
def test_a_type_that_the_native_kernels_lack_is_refused(tiny_llama):
    """The message has those that they have; where they do not run, it is taken."""
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='float16'.*'bfloat16', 'fp8' or 'int8'"):
        LLM(tiny_llama, dtype="float32", kv_cache_dtype="float16")
    LLM(tiny_llama, dtype="float16", kv_cache_dtype="float16").close()
