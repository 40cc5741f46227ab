"""Whole steps of the native kernels with adapters: what they compute, and for whom."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, build_config, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import instruction_sets, use_isa
from paged import PagedRunner
from random_adapters import merged_decoder, random_adapter

from quire.kernels import available_backends, get_backend
from quire.models.adapter import Adapter
from quire.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

Load = Callable[..., Decoder]
Make = Callable[[str], Path]
Get = Callable[..., Decoder]

REFERENCE = get_backend("cpu", "reference")
NAMES = (
    "llama",
    "llama-mha-bias-tied",
    "qwen2-tied",
    "gpt2",
    "falcon-7b",
    "falcon-rw",
    "phi3",
    "gemma2",
    "opt-350m",
    "mpt-6-heads",
    "gpt-neox",
)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def prefill(
    decoder: Decoder, prompts: list[list[int]], slots: list[int] | None, **options: Any
) -> list[torch.Tensor]:
    runner = PagedRunner(
        decoder,
        get_backend("cpu"),
        num_seqs=len(prompts),
        max_len=max(map(len, prompts)),
        block_size=options.pop("block_size", 8),
        adapters=slots,
    )
    return runner.prefill(prompts, seed=options.pop("seed", 0))


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Make, load: Load) -> Get:
    """``get(name, backend="cpu", max_adapters=4, dtype=float32)``: each made once."""
    made: dict[Any, Decoder] = {}

    def get(
        name: str,
        backend: str = "cpu",
        max_adapters: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> Decoder:
        key = (name, backend, max_adapters, dtype)
        if key not in made:
            folder = tiny_checkpoint(name)
            made[key] = load(folder, backend=backend, max_adapters=max_adapters, dtype=dtype)
            assert (made[key].native is not None) == (backend == "cpu")
        return made[key]

    return get


def put(decoder: Decoder, adapters: Sequence[Adapter]) -> None:
    for slot, adapter in enumerate(adapters):
        decoder.set_adapter(slot, decoder.prepare_adapter(adapter))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=max(1, settings.default.max_examples // 10))
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_a_batch_of_many_adapters_is_each_merged_model_on_its_own(
    name: str, seeds: list[int], order: random.Random, decoders: Get
) -> None:
    """Any ranks, subsets, biases, DoRA, embeddings and heads: to float32's rounding."""
    decoder, plain = decoders(name), decoders(name, "reference", 0)
    dtype = order.choice([torch.float32, torch.bfloat16, torch.float16])
    adapters = [random_adapter(plain, seed, dtype) for seed in seeds]
    put(decoder, adapters)
    slots = [order.randrange(-1, len(adapters)) for _ in range(5)]
    prompts = prompts_of([order.randint(1, 20) for _ in slots], seeds[0])
    with use_isa(order.choice(instruction_sets())):
        together = prefill(decoder, prompts, slots, seed=seeds[0])
    for slot in sorted(set(slots)):
        adapter = None if slot < 0 else adapters[slot]
        merged = merged_decoder(plain, REFERENCE, adapter)
        own = [number for number, each in enumerate(slots) if each == slot]
        expected = prefill(merged, [prompts[number] for number in own], None)
        for number, logits in zip(own, expected, strict=True):
            error = together[number] - logits
            assert error.norm() <= 2e-5 * logits.norm()
            assert error.abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "opt-350m"])
def test_a_sequence_has_the_same_bits_in_any_company(
    isa: str, name: str, dtype: torch.dtype, decoders: Get
) -> None:
    """Alone in another slot or among others, in whatever chunks, on however many threads.

    Sequences without an adapter have the bits of a decoder that has no slots.
    """
    decoder = decoders(name, dtype=dtype)
    types = [torch.float32, torch.bfloat16]
    adapters = [
        decoder.prepare_adapter(random_adapter(decoder, seed, types[seed % 2])) for seed in range(3)
    ]
    prompts, slots = prompts_of([60, 41, 17, 64, 1]), [2, 0, -1, 0, 1]
    expected = []
    for prompt, slot in zip(prompts, slots, strict=True):
        if slot < 0:
            expected += prefill(decoders(name, max_adapters=0, dtype=dtype), [prompt], None)
        else:
            decoder.set_adapter(3, adapters[slot])
            expected += prefill(decoder, [prompt], [3])
    for slot, each in enumerate(adapters):
        decoder.set_adapter(slot, each)
    before = torch.get_num_threads()
    try:
        for num_threads, seed, block_size in ((1, 1, 8), (2, 2, 16), (3, 3, 5)):
            torch.set_num_threads(num_threads)
            together = prefill(decoder, prompts, slots, seed=seed, block_size=block_size)
            for ours, alone in zip(together, expected, strict=True):
                assert torch.equal(ours, alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "phi3"])
def test_bfloat16_models_are_as_close_to_exact_numbers_with_adapters_as_without(
    isa: str, name: str, decoders: Get
) -> None:
    """Gains are computed in float32 by every instruction set, from what it has for activations."""
    decoder, plain = (
        decoders(name, backend, dtype=torch.bfloat16) for backend in ("cpu", "reference")
    )
    prompts = prompts_of([20, 9])

    def error_of(adapter: Adapter | None) -> float:
        exact = torch.cat(prefill(merged_decoder(plain, REFERENCE, adapter), prompts, None))
        ours = torch.cat(prefill(decoder, prompts, None if adapter is None else [0, 0]))
        return float((ours - exact).norm() / exact.norm())

    bound = 2 * error_of(None)
    for seed in range(3):
        adapter = random_adapter(plain, seed, [torch.float32, torch.bfloat16][seed % 2])
        put(decoder, [adapter])
        assert error_of(adapter) <= bound


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 9,001 tokens: several stretches of logits, the last of them no whole block."""
    folder = tmp_path_factory.mktemp("large_vocabulary")
    config = build_config("llama")
    config.vocab_size = 9001
    build_model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["large", "qwen2-tied", "gemma2", "opt-350m"])
def test_the_likeliest_token_is_that_of_the_logits(
    name: str, dtype: torch.dtype, decoders: Get, load: Load, large_vocabulary: Path
) -> None:
    """Bit for bit, with output matrices that gain, that are an adapter's own, and plain ones."""
    if name == "large":
        decoder = load(large_vocabulary, backend="cpu", max_adapters=4, dtype=dtype)
    else:
        decoder = decoders(name, dtype=dtype)
    native = decoder.native
    assert native is not None
    adapters = [random_adapter(decoder, seed, strength=3) for seed in range(12)]
    own = [each for each in adapters if each.lm_head_weight is not None]
    gaining = [
        each for each in adapters if each.lm_head_weight is None and "lm_head" in each.linears
    ]
    put(decoder, [own[0], gaining[0], own[1], gaining[1]])
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, decoder.spec.hidden_size, generator=generator)
    hidden[7] = torch.nan
    indices = torch.randperm(40, generator=generator)[:35]
    for least, most in ((-1, 3), (0, 0), (1, 1), (-1, -1)):
        slots = torch.randint(least, most + 1, (35,), generator=generator).int()
        ids, highest = native.likeliest(hidden, indices, slots)
        logits = native.logits(hidden[indices], slots)
        assert torch.equal(highest.isnan(), indices == 7)
        rows = (indices != 7).nonzero()[:, 0]
        assert torch.equal(highest[rows], logits.max(dim=1).values[rows])
        assert torch.equal(ids[rows], logits[rows].argmax(dim=1))
        nobody = slots < 0
        assert torch.equal(
            logits[nobody & (indices != 7)], native.logits(hidden[indices])[nobody & (indices != 7)]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_in_plain_order(name: str, dtype: torch.dtype, decoders: Get) -> None:
    """Though the kernels hold them in blocks; as copies."""
    decoder, plain = (decoders(name, backend, dtype=dtype) for backend in ("cpu", "reference"))
    for each in ("embed", *plain.linears()):
        weight = decoder.read_weight(each)
        assert torch.equal(weight, plain.read_weight(each)), each
        weight.zero_()
        assert torch.equal(decoder.read_weight(each), plain.read_weight(each)), each


def test_preparing_changes_nothing_and_runs_beside_steps(decoders: Get) -> None:
    """On another thread, while steps are computed; the adapter's tensors stay what they are."""
    decoder = decoders("llama")
    adapter = random_adapter(decoder, 5)
    before = [each.clone() for each in adapter.tensors()]
    put(decoder, [adapter])
    prompts = prompts_of([30, 11])
    expected = prefill(decoder, prompts, [0, -1])
    prepared = []
    done = threading.Event()

    def prepare() -> None:
        while not done.is_set():
            prepared[:] = [decoder.prepare_adapter(adapter)]

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        for _ in range(5):
            for ours, theirs in zip(prefill(decoder, prompts, [0, -1]), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        done.set()
        thread.join()
    decoder.set_adapter(1, prepared[0])
    assert torch.equal(prefill(decoder, prompts, [1, -1])[0], expected[0])
    for ours, theirs in zip(adapter.tensors(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_is_freed_once_nobody_refers_to_it(decoders: Get) -> None:
    """A slot keeps it as long as it is there, and no longer; its size is what it holds."""
    decoder = decoders("llama")
    adapter = random_adapter(decoder, 0)
    prepared = decoder.prepare_adapter(adapter)
    size = sum(each.nbytes for each in adapter.tensors())
    assert size <= prepared.num_bytes <= 12 * size
    form = weakref.ref(prepared.form)
    decoder.set_adapter(0, prepared)
    del prepared
    gc.collect()
    assert form() is not None
    prefill(decoder, prompts_of([5]), [0])
    decoder.set_adapter(0, None)
    gc.collect()
    assert form() is None
