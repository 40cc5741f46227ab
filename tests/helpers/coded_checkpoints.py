"""Pairs of checkpoints: one in a quantized format, and one with what its codes stand for, plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from folders import Tensors, configure, copy_of, rewrite
from safetensors.torch import load_file

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.models.hf_config import read_config
from quire.models.registry import family_of
from quire.quantization.pack.awq import awq_config, awq_tensors
from quire.quantization.pack.compressed_tensors import quantization_config, scheme_of, tensors_of
from quire.quantization.pack.gptq import gptq_config, gptq_tensors
from quire.quantization.rounding import Grid, round_fp8, round_int4, round_int8

GROUP = 16


@dataclass(frozen=True)
class Recipe:
    """How every projection of the layers gets its codes, and a checkpoint its tensors of them."""

    name: str
    round: Callable[[torch.Tensor], QuantizedWeight]
    pack: Callable[[QuantizedWeight], Tensors]
    config: Callable[[dict[str, QuantizedWeight], list[str]], dict[str, Any]]


def _int4(weight: torch.Tensor, *, symmetric: bool = False) -> QuantizedWeight:
    return round_int4(weight, Grid(GROUP, symmetric, clip=False, scale_dtype=torch.float16))


def _with_order(weight: torch.Tensor) -> QuantizedWeight:
    """The same order for all weights of as many inputs, as those that share an input have."""
    size = weight.shape[1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    order = order.view(-1, GROUP).sort(1).values.flatten()  # stable within a group, as files are
    made = _int4(weight[:, order], symmetric=True)
    return QuantizedWeight(
        made.kind, made.codes, made.scales, size, made.group_size, made.zeros, order
    )


def _compressed(weights: dict[str, QuantizedWeight], plain: list[str]) -> dict[str, Any]:
    return quantization_config({name: scheme_of(each) for name, each in weights.items()}, plain)


RECIPES = {
    each.name: each
    for each in (
        Recipe("awq", _int4, awq_tensors, lambda *_: awq_config(GROUP)),
        Recipe(
            "gptq",
            _with_order,
            lambda weight: gptq_tensors(weight, 4, "gptq_v2"),
            lambda *_: gptq_config(4, GROUP, sym=True, desc_act=True, version="gptq_v2"),
        ),
        Recipe(
            "gptq-8",
            lambda weight: round_int8(weight, scale_dtype=torch.float16),
            lambda weight: gptq_tensors(weight, 8),
            lambda *_: gptq_config(8, -1, sym=True),
        ),
        Recipe(
            "w8a8",
            lambda weight: round_int8(weight, "int8"),
            lambda weight: tensors_of(weight, torch.float32),
            _compressed,
        ),
        Recipe("fp8", round_fp8, lambda weight: tensors_of(weight, torch.float32), _compressed),
    )
}


def write_pair(source: Path, target: Path, recipe: Recipe) -> tuple[Path, Path]:
    """Write a model in a format, and the same model with its weights dequantized, in float32.

    Returns
    -------
    quantized, plain : Path
    """
    quantized, plain = target / "quantized", target / "plain"
    quantized.mkdir(parents=True)
    plain.mkdir()
    quantized, plain = copy_of(source, quantized), copy_of(source, plain)
    _, family = family_of(read_config(source))
    weights: dict[str, QuantizedWeight] = {}
    values: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        found = family.find(name)
        assert found is not None, name
        if found.kind != "weight" or not found.to.module.startswith("layers.") or tensor.dim() != 2:
            continue
        if found.to.module.endswith((".router", ".shared_gate")):  # as tools leave them
            continue
        turned = found.to.layout == "transposed"
        weight = recipe.round(tensor.t().contiguous() if turned else tensor)
        weights[found.module] = weight
        value = dequantize(weight)
        values[name] = value.t().contiguous() if turned else value

    def to_codes(tensors: Tensors) -> None:
        for module, weight in weights.items():
            del tensors[f"{module}.weight"]
            tensors.update({f"{module}.{k}": t for k, t in recipe.pack(weight).items()})

    rewrite(quantized, to_codes)
    rewrite(plain, lambda tensors: tensors.update(values))
    configure(quantized, quantization_config=recipe.config(weights, ["lm_head", "embed_out"]))
    return quantized, plain
