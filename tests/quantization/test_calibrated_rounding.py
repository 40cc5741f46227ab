"""Calibration: the walk sees what the model sees, and what is learned holds for other inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS

from quire.converter.source import Source
from quire.errors import ConfigError, ModelLoadError
from quire.kernels.reference.quantized import dequantize, quantized_linear
from quire.models.calibration import calibrate
from quire.models.hf_config import read_config
from quire.models.layer_walk import LayerWalk
from quire.models.mlp import is_expert
from quire.models.registry import build_spec
from quire.quantization.activation_aware import search
from quire.quantization.error_compensation import round_compensated
from quire.quantization.on_load import QUANTIZERS, Int4
from quire.quantization.rounding import Grid, round_int4

PROMPTS = [
    [5, 9, 200, 31, 7, 12],
    [1],
    [44, 3, 3, 270, 18, 90, 6, 2, 100, 50, 51, 52, 53, 54, 55, 8, 9],
]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_walk_sees_the_inputs_that_transformers_computes(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Source(folder) as source:
        modules = source.modules()
        wanted: dict[str, list[torch.Tensor]] = {}
        for module in modules:
            if is_expert(module.linear.name):  # no module of its own there
                continue
            seen = wanted.setdefault(module.linear.name, [])
            of_model = model.get_submodule(module.name)
            of_model.register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0].flatten(0, -2))
            )
        with torch.no_grad():
            for prompt in PROMPTS:
                model(torch.tensor([prompt]))
        # LongRoPE's factors are those of sequences as short as these.
        spec = build_spec(source.config, 32)
        walk = LayerWalk(source.files, source.family, spec, PROMPTS)
        walked = {
            name: x
            for layer in walk.layers()
            for name, x in layer.inputs.items()
            if not is_expert(name)
        }
    assert walked.keys() == wanted.keys()
    for linear, tensors in wanted.items():
        # Queries, keys and values have one input, which each of their modules was given.
        once = tensors[:: len([each for each in modules if each.linear.name == linear])]
        torch.testing.assert_close(walked[linear], torch.cat(once), rtol=1e-4, atol=1e-4)


def test_later_layers_are_given_what_replaced_weights_make(tiny_llama: Path) -> None:
    with Source(tiny_llama) as source:
        plain, changed = (
            LayerWalk(source.files, source.family, source.spec, PROMPTS).layers() for _ in range(2)
        )
        next(plain), (layer := next(changed))
        linear = layer.linears[-1]
        layer.replace(linear, "down", torch.zeros(linear.out_features, linear.in_features))
        kept, other = next(plain), next(changed)
    assert not torch.equal(kept.inputs["layers.1.mlp.down"], other.inputs["layers.1.mlp.down"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "without tokens"),
        ([[1, 304]], "the token id 304; the model's are from 0 to 303"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(
    prompts: list[list[int]], message: str, tiny_llama: Path
) -> None:
    with Source(tiny_llama) as source, pytest.raises(ConfigError, match=message):
        LayerWalk(source.files, source.family, source.spec, prompts)


def test_a_model_whose_activations_are_no_numbers_is_refused(tmp_path: Path) -> None:
    from checkpoints import write_checkpoint
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with Source(tmp_path) as source:
        walk = LayerWalk(source.files, source.family, source.spec, PROMPTS)
        with pytest.raises(ModelLoadError, match=r"not finite in layers\.1"):
            list(walk.layers())


def uneven_inputs(num_tokens: int, seed: int) -> torch.Tensor:
    """Inputs that depend on each other, a few of them far larger than the rest."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(128, 128, generator=generator) * 0.3 + torch.eye(128)
    sizes = torch.ones(128)
    sizes[torch.randperm(128, generator=generator)[:6]] = 40.0
    generator.manual_seed(seed)
    return torch.randn(num_tokens, 128, generator=generator) @ mix * sizes


WEIGHT = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
SEEN, HELD_OUT = uneven_inputs(700, 3), uneven_inputs(300, 4)


def output_error(weight: Any) -> float:
    """On inputs that no calibration saw."""
    return (quantized_linear(HELD_OUT, weight) - HELD_OUT @ WEIGHT.T).square().mean().item()


@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_aware_scales_lower_the_error_on_other_inputs(symmetric: bool) -> None:
    grid = Grid(64, symmetric)
    found = search([WEIGHT[:40], WEIGHT[40:]], SEEN, grid)
    assert found.factors is not None
    aware = round_int4(WEIGHT, grid, found.factors, found.importance)
    assert output_error(aware) < 0.6 * output_error(round_int4(WEIGHT, grid))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_compensated_rounding_lowers_the_error_on_other_inputs(
    symmetric: bool, by_importance: bool, group_size: int
) -> None:
    grid = Grid(group_size, symmetric)
    made = round_compensated(WEIGHT, SEEN, grid, by_importance=by_importance)
    share = 0.6 if by_importance else 0.8
    assert output_error(made) < share * output_error(round_int4(WEIGHT, grid))
    if by_importance:
        assert made.order is not None
        groups = made.order.view(-1, group_size)
        assert torch.equal(groups, groups.sort(1).values)
        assert torch.equal(made.order.sort().values, torch.arange(128))


def test_one_candidate_is_no_factors() -> None:
    assert search([WEIGHT], SEEN, Grid(64), num_alphas=1).factors is None


def test_compensated_rounding_goes_on_with_fewer_inputs_than_columns() -> None:
    """And with some that were always zero: the Hessian has no inverse of its own."""
    inputs = torch.randn(5, 128)
    inputs[:, 10:20] = 0
    made = round_compensated(WEIGHT, inputs, Grid(64))
    assert (dequantize(made) - WEIGHT).abs().max() < 2
    assert dequantize(made).isfinite().all()


def test_a_calibrated_quantizer_gives_all_parts_the_same_factors(tiny_llama: Path) -> None:
    """They are one projection, whose inputs are multiplied once."""
    quantizer = QUANTIZERS["int4"]({"calibration": ["some text", [4, 5, 6]], "group_size": 8})
    assert isinstance(quantizer, Int4)
    texts = []

    def encode(text: str) -> list[int]:
        texts.append(text)
        return list(range(40, 60))

    calibrate(quantizer, tiny_llama, read_config(tiny_llama), encode)
    assert texts == ["some text"]
    parts = [
        quantizer.quantize(f"layers.0.attention.qkv.{part}", torch.randn(32, 64)) for part in "qkv"
    ]
    factors = [part.input_factors for part in parts if part is not None]
    assert len(factors) == 3
    if factors[0] is not None:
        assert all(each is not None and torch.equal(each, factors[0]) for each in factors)
    head = quantizer.quantize("lm_head", torch.randn(32, 64))
    assert head is not None
    assert head.input_factors is None
