"""Adapters over weights in codes: as over what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_checkpoints import RECIPES, write_pair
from coded_decoders import BACKENDS, assert_close, load_decoder, plain_twin, prefill
from peft_adapters import read, write_adapter
from random_adapters import random_adapter

from quire.models.adapter import Adapter
from quire.models.decoder import Decoder

Make = Callable[[str], Path]
SLOTS = [0, -1, 1, 0]
LENGTHS = [9, 4, 17, 1]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def put(decoder: Decoder, adapters: list[Adapter]) -> None:
    for slot, adapter in enumerate(adapters):
        decoder.set_adapter(slot, decoder.prepare_adapter(adapter))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "falcon-40b"])
def test_adapters_are_what_they_are_over_the_values(
    name: str, quantization: str, backend: str, tiny_checkpoint: Make
) -> None:
    """Any subsets, ranks, biases, factors, embeddings and heads, in a batch with none."""
    folder = tiny_checkpoint(name)
    decoder = load_decoder(folder, backend, quantization, max_adapters=2)
    twin = plain_twin(decoder, folder, max_adapters=2)
    most = 1e-4 if backend == "reference" else 1e-2
    for seed in range(3):
        made = [[random_adapter(twin, each) for each in (seed, seed + 100)] for _ in range(2)]
        put(decoder, made[0])
        put(twin, made[1])
        assert_close(prefill(decoder, LENGTHS, SLOTS), prefill(twin, LENGTHS, SLOTS), most)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", ["awq", "gptq", "gptq-8"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [*PROJECTIONS, "lm_head"], "use_dora": True},
        {"target_modules": PROJECTIONS, "bias": "all"},
        {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},
    ],
    ids=["dora", "biases", "embeddings"],
)
def test_an_adapter_of_peft_is_read_for_the_values(
    config: dict[str, Any], recipe: str, backend: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """DoRA's norms are those of the dequantized weights with the adapter's product added."""
    pytest.importorskip("peft")
    coded, plain = write_pair(tiny_checkpoint("qwen2"), tmp_path, RECIPES[recipe])
    folder = write_adapter(plain, tmp_path / "adapter", **config)
    decoder = load_decoder(coded, backend, max_adapters=2)
    twin = load_decoder(plain, max_adapters=2)
    ours, theirs = read(plain, folder, decoder=decoder), read(plain, folder, decoder=twin)
    for name, delta in theirs.linears.items():
        factor = ours.linears[name].factor
        assert (factor is None) == (delta.factor is None)
        if factor is not None and delta.factor is not None:
            assert torch.allclose(factor, delta.factor, rtol=1e-5)
    put(decoder, [ours])
    put(twin, [theirs])
    slots = [0, -1, 0, 0]
    most = 1e-4 if backend == "reference" else 1e-2
    assert_close(prefill(decoder, LENGTHS, slots), prefill(twin, LENGTHS, slots), most)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_read_as_they_were_packed(
    backend: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Bit for bit, act-order and zeros included."""
    for recipe in ("awq", "gptq", "gptq-8"):
        coded, plain = write_pair(tiny_checkpoint("phi3"), tmp_path / recipe, RECIPES[recipe])
        decoder, twin = load_decoder(coded, backend), load_decoder(plain)
        for name in twin.linears():
            assert torch.equal(decoder.read_weight(name), twin.read_weight(name)), name
