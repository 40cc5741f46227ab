"""Comparisons of what reads weights in codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kernel_draw import Draw, agree

from quire.kernels.quantized import Kind, QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.reference.quantized import dequantize

REFERENCE = ReferenceBackend()


def draw_weight(draw: Draw, outputs: int, inputs: int) -> QuantizedWeight:
    """Draw a weight of any kind, with whatever belongs to it, on the CPU."""
    kind: Kind = draw.rng.choice(["int8", "int4", "fp8", "table4"])
    group = draw.rng.choice([8, 32, 40, 64, 128, inputs])
    groups = -(-inputs // group)
    if kind == "int8":
        codes = draw.integers(-128, 128, outputs, inputs).to(torch.int8)
    elif kind == "fp8":
        codes = draw.integers(0, 256, outputs, inputs).to(torch.uint8)
        codes[codes & 127 == 127] = 1  # no NaN
        codes = codes.view(torch.float8_e4m3fn)
    else:
        codes = draw.integers(0, 256, outputs, (inputs + 1) // 2).to(torch.uint8)
    has_zeros = kind in ("int8", "int4") and draw.rng.random() < 0.4
    shape = draw.rng.choice([(16,), (outputs, 16)])
    return QuantizedWeight(
        kind,
        codes,
        (0.1 + draw.uniform(outputs, groups)).float(),
        inputs,
        group,
        zeros=draw.integers(0, 16, outputs, groups).short() if has_zeros else None,
        order=torch.randperm(inputs, generator=draw.generator) if draw.rng.random() < 0.3 else None,
        input_factors=(0.5 + draw.uniform(inputs)).float() if draw.rng.random() < 0.2 else None,
        table=draw.noise(*shape, dtype=torch.float32) if kind == "table4" else None,
    )


def moved(draw: Draw, weight: QuantizedWeight) -> QuantizedWeight:
    """Copy a weight to the device."""
    return replace(weight, **{name: draw.here(each) for name, each in weight.tensors().items()})


def quantized_linear(draw: Draw, backend: Any) -> None:
    """Of one row and of many, inputs rounded to 8 bits too."""
    rows = draw.rng.choice([0, 1, 2, 17, draw.size(1, 40, 600)])
    weight = draw_weight(draw, draw.size(1, 70, 3000), draw.size(1, 150, 4096))
    if weight.kind in ("int8", "int4") and draw.rng.random() < 0.3:
        weight = replace(weight, activations="int8", input_factors=None)
    x = draw.noise(rows, weight.in_features)
    bias = draw.noise(weight.out_features) if draw.rng.random() < 0.5 else None
    got = backend.quantized_linear(
        draw.strided(x), moved(draw, weight), None if bias is None else draw.here(bias)
    )
    expected = REFERENCE.quantized_linear(x.float(), weight, None if bias is None else bias.float())
    largest = 0.0
    if weight.zeros is not None and rows:  # what is taken off for them may be large
        largest = float(x.float().abs().sum(1).max() * weight.scales.max())
    name = f"quantized_linear {weight.kind}, {rows} rows"
    # Inputs and entries of tables may lose a part in 2^15; see the operation's contract.
    factor = 5.0 if draw.dtype is torch.float32 else 1.0
    agree(name, got, expected, draw.dtype, largest=largest, factor=factor)


def quantized_embedding(draw: Draw, backend: Any) -> None:
    """Rows of the dequantized weight."""
    weight = replace(
        draw_weight(draw, draw.size(1, 40, 20_000), draw.size(1, 60, 512)), input_factors=None
    )
    ids = draw.integers(0, weight.out_features, draw.size(0, 9, 500))
    got = backend.quantized_embedding(draw.here(ids), moved(draw, weight), draw.dtype)
    agree("quantized_embedding", got, dequantize(weight)[ids], draw.dtype)


QUANTIZED = {"quantized_linear": quantized_linear, "quantized_embedding": quantized_embedding}
