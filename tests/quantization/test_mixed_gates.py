"""Gates and ups that are not kept alike: a product of both is what their codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coded_decoders import BACKENDS, CPU, assert_close, load_decoder, most_off, plain_twin, prefill
from random_adapters import random_adapter

from quire.kernels import get_backend
from quire.kernels.quantized import QuantizedWeight
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.registry import build_spec
from quire.quantization.rounding import Grid, round_fp8, round_int4, round_int8

Make = Callable[[str], Path]
Round = Callable[[torch.Tensor], QuantizedWeight | None]


def int4(size: int, symmetric: bool = False) -> Round:
    return lambda weight: round_int4(
        weight, Grid(size, symmetric, clip=False, scale_dtype=torch.float16)
    )


def ordered(seed: int) -> Round:
    def make(weight: torch.Tensor) -> QuantizedWeight:
        size = weight.shape[1]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        made = round_int8(weight[:, order])
        return QuantizedWeight(made.kind, made.codes, made.scales, size, size, order=order)

    return make


PAIRS: dict[str, tuple[Round, Round]] = {
    "plain up": (int4(16), lambda _: None),
    "plain gate": (lambda _: None, round_int8),
    "kinds": (round_int8, int4(16)),
    "floats": (round_fp8, round_int8),
    "groups": (int4(16), int4(32)),
    "more groups": (int4(32), int4(8)),
    "zeros": (int4(16), int4(16, symmetric=True)),
    "no zeros": (int4(16, symmetric=True), int4(16)),
    "order": (ordered(1), ordered(2)),
    "no order": (round_int8, ordered(3)),
    "activations": (round_int8, lambda weight: round_int8(weight, "int8")),
}


def mixed(pair: str, backend: str, folder: Path, max_adapters: int = 0) -> Decoder:
    """A plain model, but for its gates and ups."""
    plain = load_decoder(folder)
    decoder = Decoder(
        build_spec(read_config(folder), None),
        device=CPU,
        dtype=torch.float32,
        kernels=get_backend(CPU, backend),
        max_adapters=max_adapters,
    )
    for name in decoder.weights.names():
        if not name.endswith("mlp.gate_up.weight"):
            decoder.weights.fill(name, "", "plain", plain.weights[name])
            continue
        for make, part, weight in zip(
            PAIRS[pair], decoder.weights.parts(name), plain.weights[name].chunk(2), strict=True
        ):
            codes = make(weight)
            if codes is None:
                decoder.weights.fill(name, part, "plain", weight)
            else:
                decoder.weights.put_codes(name, part, codes)
        decoder.settle(name.removesuffix(".weight"))
    decoder.bind()
    return decoder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_gates_and_ups_that_are_kept_otherwise(
    pair: str, backend: str, tiny_checkpoint: Make
) -> None:
    """One plain, or of other codes, groups, zeros or order: each is read as what it is."""
    folder = tiny_checkpoint("llama")
    decoder = mixed(pair, backend, folder)
    assert (decoder.native is not None) == (backend == "cpu")
    most = 2e-2 if pair == "activations" else most_off("llama", backend)
    assert_close(prefill(decoder), prefill(plain_twin(decoder, folder)), most)


@pytest.mark.parametrize("pair", ["plain up", "plain gate", "kinds", "order"])
def test_adapters_over_gates_and_ups_that_are_kept_otherwise(
    pair: str, isa: str, tiny_checkpoint: Make
) -> None:
    """Inputs are shrunk once for both; so by every instruction set."""
    folder = tiny_checkpoint("llama")
    decoder = mixed(pair, "cpu", folder, max_adapters=2)
    twin = plain_twin(decoder, folder, max_adapters=2)
    for seed in range(2):
        decoder.set_adapter(seed, decoder.prepare_adapter(random_adapter(twin, seed)))
        twin.set_adapter(seed, twin.prepare_adapter(random_adapter(twin, seed)))
    lengths, slots = [9, 4, 17, 1], [0, -1, 1, 0]
    assert_close(prefill(decoder, lengths, slots), prefill(twin, lengths, slots), 1e-2)
