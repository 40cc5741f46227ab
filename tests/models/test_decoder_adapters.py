"""A decoder with adapters computes what one does that has them merged into its weights."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import cpu_backends
from checkpoints import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import PagedRunner
from random_adapters import MergedMethod, merged_decoder, random_adapter

from quire.errors import AdapterError
from quire.kernels import get_backend
from quire.models.adapter import Adapter, DeltaSlice, EmbeddingDelta, LinearDelta
from quire.models.decoder import Decoder

Load = Callable[..., Decoder]
Make = Callable[[str], Path]

KERNELS = get_backend("cpu", "reference")
BACKENDS = cpu_backends()
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
    decoder: Decoder, prompts: list[list[int]], slots: list[int] | None, seed: int = 0
) -> list[torch.Tensor]:
    runner = PagedRunner(
        decoder, KERNELS, num_seqs=len(prompts), max_len=max(map(len, prompts)), adapters=slots
    )
    return runner.prefill(prompts, seed=seed)


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Make, load: Load) -> Callable[..., Decoder]:
    """``decoders(name, **options)``: each made once, with the reference kernels unless said."""
    made: dict[Any, Decoder] = {}

    def get(
        name: str,
        max_adapters: int = 4,
        dtype: torch.dtype = torch.float32,
        backend: str = "reference",
    ) -> Decoder:
        key = (name, max_adapters, dtype, backend)
        if key not in made:
            made[key] = load(
                tiny_checkpoint(name), backend=backend, max_adapters=max_adapters, dtype=dtype
            )
        return made[key]

    return get


def put(decoder: Decoder, adapters: Sequence[Adapter]) -> None:
    for slot, adapter in enumerate(adapters):
        decoder.set_adapter(slot, decoder.prepare_adapter(adapter))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=max(1, settings.default.max_examples // 10))
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_a_batch_of_many_adapters_is_each_merged_model_on_its_own(
    name: str,
    backend: str,
    seeds: list[int],
    order: random.Random,
    decoders: Callable[..., Decoder],
) -> None:
    """Any ranks, subsets, biases, DoRA, embeddings and heads: to float32's rounding."""
    decoder = decoders(name, backend=backend)
    adapters = [random_adapter(decoder, seed) for seed in seeds]
    put(decoder, adapters)
    slots = [order.randrange(-1, len(adapters)) for _ in range(5)]
    prompts = prompts_of([order.randint(1, 20) for _ in slots], seeds[0])
    together = prefill(decoder, prompts, slots, seed=seeds[0])
    for slot in sorted(set(slots)):
        adapter = None if slot < 0 else adapters[slot]
        merged = merged_decoder(decoders(name), KERNELS, adapter)
        own = [number for number, each in enumerate(slots) if each == slot]
        expected = prefill(merged, [prompts[number] for number in own], None)
        for number, logits in zip(own, expected, strict=True):
            error = together[number] - logits
            assert error.norm() <= 2e-5 * logits.norm()
            assert error.abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "opt-350m"])
def test_tokens_without_an_adapter_keep_the_bits_of_the_plain_model(
    name: str, dtype: torch.dtype, backend: str, decoders: Callable[..., Decoder]
) -> None:
    """Beside tokens that have one; and all tokens do, once the slots are empty again."""
    decoder, plain = decoders(name, 4, dtype, backend), decoders(name, 0, dtype, backend)
    put(decoder, [random_adapter(decoder, seed, dtype) for seed in range(3)])
    prompts = prompts_of([20, 9, 14, 1, 30])
    expected = prefill(plain, prompts, None)
    mixed = prefill(decoder, prompts, [2, -1, 0, -1, 1])
    for number in (1, 3):
        assert torch.equal(mixed[number], expected[number])
    for number in (0, 2, 4):
        assert not torch.equal(mixed[number], expected[number])
    for slot in range(3):
        decoder.set_adapter(slot, None)
    for slots in (None, [-1] * 5):
        for ours, theirs in zip(prefill(decoder, prompts, slots), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_sequence_is_the_same_alone_and_in_any_slot(
    name: str, backend: str, decoders: Callable[..., Decoder]
) -> None:
    """What comes out for an adapter is its own: neither its neighbours nor its place matter."""
    decoder = decoders(name, backend=backend)
    prepared = [decoder.prepare_adapter(random_adapter(decoder, seed)) for seed in range(3)]
    prompts = prompts_of([20, 9, 14, 5])
    for slot, each in enumerate(prepared):
        decoder.set_adapter(slot, each)
    together = prefill(decoder, prompts, [0, 1, 2, 1])
    for slot, each in enumerate(reversed(prepared)):
        decoder.set_adapter(slot, each)
    for ours, theirs in zip(together, prefill(decoder, prompts, [2, 1, 0, 1]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    decoder.set_adapter(2, None)
    decoder.set_adapter(1, None)
    for number, adapter in enumerate([0, 1, 2, 1]):
        decoder.set_adapter(0, prepared[adapter])
        [alone] = prefill(decoder, [prompts[number]], [0])
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_model_is_as_close_to_exact_numbers_with_adapters_as_without(
    dtype: torch.dtype, decoders: Callable[..., Decoder]
) -> None:
    """Gains are computed in float32, whatever the types of model and adapter."""
    decoder = decoders("qwen2-tied", dtype=dtype)
    prompts = prompts_of([20, 9])

    def error_of(adapter: Adapter | None) -> float:
        exact = prefill(merged_decoder(decoder, KERNELS, adapter), prompts, None)
        ours = prefill(decoder, prompts, None if adapter is None else [0, 0])
        total = torch.cat(exact)
        return float((torch.cat(ours) - total).norm() / total.norm())

    plain = error_of(None)
    for seed in range(4):
        adapter = random_adapter(decoder, seed, [torch.float32, dtype][seed % 2])
        put(decoder, [adapter])
        assert error_of(adapter) <= 2 * plain


def test_adapters_do_not_ask_how_a_projection_is_multiplied(
    tiny_checkpoint: Make, load: Load
) -> None:
    """DoRA's factor is for the product alone, though a method may give it only with its bias."""
    plain = load(tiny_checkpoint("gpt2"), backend="reference")
    decoder = Decoder(
        plain.spec,
        device=plain.weights.device,
        dtype=torch.float32,
        kernels=KERNELS,
        method=MergedMethod(None),
        max_adapters=1,
    )
    for name in decoder.weights.names():
        decoder.weights[name].copy_(plain.weights[name])
    decoder.bind()
    generator = torch.Generator().manual_seed(0)
    linears = {
        name: LinearDelta(
            torch.empty(0, linear.in_features),
            torch.empty(0),
            (),
            factor=1 + torch.rand(linear.out_features, generator=generator),
        )
        for name, linear in decoder.linears().items()
    }
    adapter = Adapter("scaled", linears)
    put(decoder, [adapter])
    prompts = prompts_of([12])
    [ours] = prefill(decoder, prompts, [0])
    [expected] = prefill(merged_decoder(plain, KERNELS, adapter), prompts, None)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_freed_once_nobody_refers_to_it(
    backend: str, decoders: Callable[..., Decoder]
) -> None:
    """Neither a step that ran nor another adapter in its slot keeps its memory."""
    decoder = decoders("llama", backend=backend)
    adapter = random_adapter(decoder, 0)
    tensors = [weakref.ref(each) for each in adapter.tensors()]
    num_bytes = sum(each.nbytes for each in adapter.tensors())
    prepared = decoder.prepare_adapter(adapter)
    del adapter
    assert prepared.num_bytes >= num_bytes
    parts = [weakref.ref(prepared)]
    if decoder.native is None:
        assert all(each() is not None for each in tensors)
    else:
        parts.append(weakref.ref(prepared.form))
    decoder.set_adapter(0, prepared)
    prefill(decoder, prompts_of([5, 3]), [0, 0])
    del prepared
    decoder.set_adapter(0, decoder.prepare_adapter(random_adapter(decoder, 1)))
    gc.collect()
    assert all(each() is None for each in (*parts, *tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_prepared_beside_running_steps(
    backend: str, decoders: Callable[..., Decoder]
) -> None:
    """Weights may be read and adapters prepared on any thread: no step's bits change."""
    decoder = decoders("qwen2-tied", backend=backend)
    put(decoder, [random_adapter(decoder, seed) for seed in range(2)])
    prompts = prompts_of([30, 20, 25])
    expected = prefill(decoder, prompts, [0, 1, -1])
    done = threading.Event()

    def prepare() -> int:
        number = 0
        while not done.is_set() or number < 3:
            decoder.prepare_adapter(random_adapter(decoder, number))
            number += 1
        return number

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(prepare) for _ in range(2)]
        try:
            for _ in range(5):
                again = prefill(decoder, prompts, [0, 1, -1])
                assert all(map(torch.equal, again, expected))
        finally:
            done.set()
        assert all(each.result() >= 3 for each in others)


def test_equal_adapters_are_two(decoders: Callable[..., Decoder]) -> None:
    """A prepared adapter is compared by identity: it is memory, and not only a digest."""
    decoder = decoders("llama")
    first, second = (decoder.prepare_adapter(random_adapter(decoder, 7)) for _ in range(2))
    assert first.digest == second.digest
    assert first != second
    assert len({first, second}) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "opt-350m"])
def test_weights_are_read_as_copies_in_plain_order(
    name: str, dtype: torch.dtype, backend: str, decoders: Callable[..., Decoder]
) -> None:
    """Of every projection, the embedding and the output matrix, tied or not, packed or not."""
    decoder, source = decoders(name, 0, dtype, backend), decoders(name, 0, dtype).weights
    linears = decoder.linears()
    assert [linear.name for linear in linears.values()] == list(linears)
    for linear in linears.values():
        weight, bias = decoder.read_weight(linear.name), decoder.read_bias(linear.name)
        assert weight.shape == (linear.out_features, linear.in_features)
        assert (bias is not None) == linear.bias
        name_there = f"{linear.name}.weight"
        if name_there not in source:
            assert linear.name == "lm_head"
            name_there = "embed.weight"
        assert torch.equal(weight, source[name_there])
        weight.zero_()
        assert torch.equal(decoder.read_weight(linear.name), source[name_there])
        if bias is not None:
            assert torch.equal(bias, source[f"{linear.name}.bias"])
            bias.zero_()
            assert torch.equal(decoder.read_bias(linear.name), source[f"{linear.name}.bias"])
    assert torch.equal(decoder.read_weight("embed"), source["embed.weight"])
    with pytest.raises(ValueError, match=r"no weight 'layers\.9"):
        decoder.read_weight("layers.9.attention.qkv")


def good(**changes: Any) -> Adapter:
    """An adapter of the tiny Llama for ``down`` (112 -> 64), with some of its fields changed."""
    delta = {"a": torch.zeros(4, 112), "scales": torch.ones(4)}
    delta["slices"] = (DeltaSlice(0, 0, torch.zeros(64, 4)),)
    whole = {key: changes.pop(key) for key in list(changes) if key in Adapter.__slots__}
    name = changes.pop("name", "layers.1.mlp.down")
    return Adapter(
        **{"digest": "x", "linears": {name: LinearDelta(**{**delta, **changes})}, **whole}
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown projection": ({"name": "layers.2.mlp.down"}, r"layers\.2\.mlp\.down.*no such"),
    "in_features": ({"a": torch.zeros(4, 111)}, r"a has the shape \[4, 111\].*\[4, 112\]"),
    "rank of a": ({"a": torch.zeros(3, 112)}, r"a has the shape \[3, 112\]"),
    "scales": ({"scales": torch.ones(4, 1)}, r"scales has the shape \[4, 1\]"),
    "type of scales": ({"scales": torch.ones(4).double()}, "float64; it must be torch.float32"),
    "type of a": ({"a": torch.zeros(4, 112).int()}, "int32; it must be float32, bfloat16 or"),
    "types": ({"a": torch.zeros(4, 112).half()}, "float16 and torch.float32"),
    "strides": ({"a": torch.zeros(112, 4).T}, "contiguous"),
    "too many outputs": (
        {"slices": (DeltaSlice(1, 0, torch.zeros(64, 4)),)},
        "outputs 1 to 64; .*64",
    ),
    "outputs below 0": ({"slices": (DeltaSlice(-1, 0, torch.zeros(64, 4)),)}, "outputs -1 to 62"),
    "outputs twice": (
        {"slices": (DeltaSlice(8, 0, torch.zeros(8, 4)), DeltaSlice(0, 0, torch.zeros(9, 4)))},
        "each in one slice",
    ),
    "ranks": ({"slices": (DeltaSlice(0, 1, torch.zeros(64, 4)),)}, "ranks 1 to 4; there are 4"),
    "vector as b": ({"slices": (DeltaSlice(0, 0, torch.zeros(64)),)}, "must be a matrix"),
    "bias": ({"bias": torch.zeros(63)}, r"bias has the shape \[63\].*\[64\]"),
    "factor": ({"factor": torch.ones(65)}, r"factor has the shape \[65\].*\[64\]"),
    "embedding a": (
        {"embedding": EmbeddingDelta(torch.zeros(303, 2), torch.zeros(64, 2), 1.0)},
        r"embedding: a has the shape \[303, 2\].*\[304, 2\]",
    ),
    "embedding b": (
        {"embedding": EmbeddingDelta(torch.zeros(304, 2), torch.zeros(64, 3), 1.0)},
        r"embedding: b has the shape \[64, 3\]",
    ),
    "embed_weight": ({"embed_weight": torch.zeros(305, 64)}, r"embed_weight.*\[305, 64\]"),
    "lm_head_weight": ({"lm_head_weight": torch.zeros(64, 304)}, r"lm_head_weight.*\[64, 304\]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    case: str, backend: str, decoders: Callable[..., Decoder]
) -> None:
    """Behind this door numbers are read by pointers."""
    changes, message = BAD[case]
    decoder = decoders("llama", backend=backend)
    decoder.prepare_adapter(good())
    with pytest.raises(AdapterError, match=message):
        decoder.prepare_adapter(good(**changes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_is_never_taken_for_another(backend: str, decoders: Callable[..., Decoder]) -> None:
    """Wrong slots and other decoders' adapters are errors, not the base model's answer."""
    decoder, other = decoders("llama", backend=backend), decoders("qwen2-tied", backend=backend)
    for slot in range(4):
        decoder.set_adapter(slot, None)
    prepared = decoder.prepare_adapter(good())
    for slot in (-1, 4):
        with pytest.raises(ValueError, match=f"slot is {slot}"):
            decoder.set_adapter(slot, prepared)
    with pytest.raises(ValueError, match="not prepared by this decoder"):
        other.set_adapter(0, prepared)
    decoder.set_adapter(1, prepared)
    prompts = prompts_of([3])
    for slot in (0, 4):
        with pytest.raises(ValueError, match=f"adapter_slots has {slot}; no adapter"):
            prefill(decoder, prompts, [slot])
        with pytest.raises(ValueError, match=f"adapter_slots has {slot}; no adapter"):
            decoder.compute_logits(torch.zeros(1, 64), torch.tensor([slot], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape \[2\]; there are 3 rows"):
        decoder.compute_logits(torch.zeros(3, 64), torch.tensor([1, 1], dtype=torch.int32))
    plain = decoders("llama", 0, backend=backend)
    with pytest.raises(ValueError, match="max_adapters=0"):
        plain.prepare_adapter(good())
    with pytest.raises(ValueError, match="no adapter is in that slot"):
        prefill(plain, prompts, [0])
