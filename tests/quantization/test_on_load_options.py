"""Quantizers while loading: what each does with which module, and options that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.errors import ConfigError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.on_load import QUANTIZERS, fitting_group

torch.manual_seed(0)
WEIGHT = torch.randn(16, 256).bfloat16()
LAYER, HEAD = "layers.0.mlp.down", "lm_head"


def made(method: str, name: str, **options: Any) -> QuantizedWeight | None:
    return QUANTIZERS[method](options or None).quantize(name, WEIGHT)


@pytest.mark.parametrize(
    ("method", "kind", "head"),
    [
        ("int8", "int8", "int8"),
        ("w8a8", "int8", "int8"),
        ("int4", "int4", "int8"),
        ("fp8", "fp8", "fp8"),
        ("nf4", "table4", None),
        ("bitsandbytes", "table4", None),
    ],
)
def test_each_makes_its_kind_and_has_its_own_way_with_the_head(
    method: str, kind: str, head: str | None
) -> None:
    weight, output = made(method, LAYER), made(method, HEAD)
    assert weight is not None
    assert weight.kind == kind
    assert (None if output is None else output.kind) == head
    assert weight.activations == ("int8" if method == "w8a8" else "float")
    assert output is None or output.activations == "float"
    assert QUANTIZERS[method](None).name == method


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
def test_the_same_weight_gives_the_same_codes(method: str) -> None:
    first, second = made(method, LAYER), made(method, LAYER)
    assert first is not None
    assert second is not None
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor.float(), second.tensors()[name].float())


@pytest.mark.parametrize(
    ("pattern", "name", "stays"),
    [
        ("layers.0", LAYER, True),
        ("layers.0.mlp", LAYER, True),
        ("layers.*.mlp.down", LAYER, True),
        ("layers.1", LAYER, False),
        ("layers.0.mlp.d", LAYER, False),
        ("*.attention.*", "layers.3.attention.qkv.q", True),
        ("lm_head", HEAD, True),
    ],
)
@pytest.mark.parametrize("method", sorted(QUANTIZERS))
def test_ignored_modules_and_all_in_them_stay(
    method: str, pattern: str, name: str, stays: bool
) -> None:
    options = {"ignore": [pattern]}
    if method in ("nf4", "bitsandbytes"):
        options["lm_head"] = "int8"
    assert (made(method, name, **options) is None) == stays


@pytest.mark.parametrize(
    ("in_features", "size"),
    [(4096, 128), (896, 128), (192, 64), (96, 32), (112, 112), (144, 72), (100, 128), (8, 128)],
)
def test_groups_fall_to_what_divides(in_features: int, size: int) -> None:
    assert fitting_group(LAYER, in_features, None) == size
    weight = QUANTIZERS["int4"](None).quantize(LAYER, torch.randn(4, in_features))
    assert weight is not None
    assert weight.group_size == min(size, in_features)
    assert weight.scales.shape[1] == -(-in_features // size)


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"\['group_size'\] is 96.*256 inputs of layers.*128"):
        made("int4", LAYER, group_size=96)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("int8", {"group_size": 64}, r"'group_size', which quantization='int8' does not take"),
        ("int4", {"groupsize": 64}, "did you mean 'group_size'"),
        ("int4", {3: 4}, "has 3"),
        ("int4", {"group_size": 7}, r"\['group_size'\] must be a multiple of 8"),
        ("int4", {"group_size": True}, "not True"),
        ("int4", {"group_size": "64"}, "not '64'"),
        ("int4", {"group_size": 0}, "not 0"),
        ("int4", {"symmetric": 1}, r"\['symmetric'\] must be True or False, not 1"),
        ("int4", {"clip": None}, r"\['clip'\] must be True or False, not None"),
        ("int4", {"lm_head": "fp8"}, r"\['lm_head'\] must be one of 'int8', 'int4', None"),
        ("int8", {"lm_head": "int4"}, r"\['lm_head'\] must be one of 'int8', None, not 'int4'"),
        ("fp8", {"ignore": "lm_head"}, r"\['ignore'\] must be a list of module names"),
        ("fp8", {"ignore": [1]}, r"\['ignore'\]"),
        ("int4", {"calibration": "text"}, r"\['calibration'\] must be a list of prompts"),
        ("int4", {"calibration": []}, r"\['calibration'\]"),
        ("int4", {"calibration": ["text", ""]}, r"\['calibration'\]"),
        ("int4", {"calibration": [[1, -1]]}, r"\['calibration'\]"),
        ("int4", {"calibration": [[1, 2.0]]}, r"\['calibration'\]"),
        ("nf4", {"calibration": ["text"]}, "'calibration', which quantization='nf4'"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(
    method: str, options: dict[Any, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QUANTIZERS[method](options)


def test_options_that_are_no_dict_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization_config must be a dict of options"):
        QUANTIZERS["int8"](["lm_head"])  # type: ignore[arg-type]
