"""FP8 checkpoints: transformers' own dequantization is what codes here are to stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.reference.quantized import dequantize
from quire.quantization.fp8 import from_config

MODULE = "model.layers.0.mlp.down_proj"


def codes_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.tuples(st.integers(1, 9), st.sampled_from([1, 4, 7, 16])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_blocks_are_dequantized_as_transformers_does(
    grid: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Bit for bit, in the type of the scales."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    shape = (grid[0] * block[0], grid[1] * block[1])
    codes = codes_of(*shape, seed)
    scales = torch.rand(grid).to(dtype)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    tensors = {"weight": codes, "weight_scale_inv": scales}
    read = from_config(config).read(MODULE, tensors, shape)
    expected = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales)
    assert torch.equal(dequantize(read).to(dtype), expected)
    assert read.codes.data_ptr() != codes.data_ptr()


@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_the_last_blocks_may_be_smaller(
    shape: tuple[int, int], block: tuple[int, int], seed: int
) -> None:
    """Row and column by the block's height and width find the scale."""
    rows, columns = shape
    codes = codes_of(rows, columns, seed)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]))
    tensors = {"weight": codes, "weight_scale_inv": scales}
    read = from_config({"weight_block_size": [*block]}).read(MODULE, tensors, shape)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    expected = codes.float() * scales[row // block[0], column // block[1]]
    assert torch.equal(dequantize(read), expected)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (torch.tensor(0.5), torch.full((6, 1), 0.5)),
        (torch.tensor([0.5]), torch.full((6, 1), 0.5)),
        (torch.tensor([0.5, 0.5, 0.5]), torch.full((6, 1), 0.5)),
        (torch.arange(1.0, 7), torch.arange(1.0, 7)[:, None]),
        (torch.arange(1.0, 7)[:, None], torch.arange(1.0, 7)[:, None]),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1, 1, 2, 2, 2])[:, None]),
    ],
)
@pytest.mark.parametrize("kind", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_without_blocks_the_shape_says_what_a_scale_is_for(
    method: str, kind: str, scales: torch.Tensor, expected: torch.Tensor
) -> None:
    """The whole, an output, or half of a module that was fused of two."""
    codes = codes_of(6, 10, 0)
    tensors = {
        "weight": codes,
        kind: scales,
        "input_scale": torch.tensor(0.1),
    }
    chosen = from_config({"quant_method": method, "activation_scheme": "static"})
    read = chosen.read("model.layers.0.mlp.gate_up_proj", tensors, (6, 10))
    assert torch.equal(dequantize(read), codes.float() * expected)
    assert read.activations == "float"
    kinds = chosen.kinds(MODULE)
    assert kinds is not None
    assert kinds.required <= set(tensors) <= kinds.required | kinds.optional


def test_modules_that_the_configuration_leaves_out_are_plain() -> None:
    """By name, by what they lie in, by ending, by expression; without a list it is the head."""
    skipping = from_config(
        {
            "modules_to_not_convert": [
                "model.layers.1",
                "o_proj",
                r"model\.layers\.[4-7]\.mlp\..*",
            ],
            "ignored_layers": ["lm_head"],
        }
    )
    assert skipping.kinds("model.layers.1.mlp.up_proj") is None
    assert skipping.kinds("model.layers.0.self_attn.o_proj") is None
    assert skipping.kinds("model.layers.5.mlp.up_proj") is None
    assert skipping.kinds("lm_head") is None
    assert skipping.kinds("model.embed_tokens") is None
    assert skipping.kinds("model.layers.11.mlp.up_proj") is not None
    assert skipping.kinds("model.layers.5.self_attn.q_proj") is not None
    assert from_config({}).kinds("lm_head") is None
    assert from_config({}).kinds(MODULE) is not None
    assert from_config({"ignored_layers": []}).kinds("lm_head") is not None


@given(
    keys=st.lists(
        st.sampled_from(
            ["lm_head", "model.layers.1", "layers.1", "mlp", "up_proj", r".*mlp\.(up|down)_proj",
             r"model\.layers\.\d+\.self_attn", "model.layers.1.mlp.up_proj", "head"]
        ),
        max_size=3,
    ),
    module=st.sampled_from(
        ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.down_proj",
         "model.layers.1.self_attn.q_proj", "model.layers.12.mlp.gate_up_proj"]
    ),
)  # fmt: skip
def test_left_out_are_those_that_transformers_leaves_out(keys: list[str], module: str) -> None:
    """The same names and expressions, matched in the same way."""
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    kinds = from_config({"modules_to_not_convert": keys}).kinds(module)
    assert (kinds is not None) == utils.should_convert_module(module, keys)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"activation_scheme": "sometimes"}, ModelLoadError, "'dynamic' or 'static'"),
        ({"activation_scheme": 3}, ModelLoadError, "'dynamic' or 'static'"),
        ({"fmt": "e5m2"}, UnsupportedModelError, "type e4m3"),
        ({"scale_fmt": "e8"}, UnsupportedModelError, "'float' is offered"),
        ({"modules_to_convert": ["model.embed"]}, UnsupportedModelError, "no kernel"),
        ({"weight_block_size": [128]}, ModelLoadError, "such as \\[128, 128\\]"),
        ({"weight_block_size": [128, 0]}, ModelLoadError, "such as \\[128, 128\\]"),
        ({"weight_block_size": 128}, ModelLoadError, "such as \\[128, 128\\]"),
        ({"modules_to_not_convert": "lm_head"}, ModelLoadError, "list of module names"),
        ({"ignored_layers": [1]}, ModelLoadError, "list of module names"),
        ({"ignored_layers": ["(a+)+$"]}, ModelLoadError, "may take forever"),
        ({"ignored_layers": ["re:("]}, ModelLoadError, "no regular expression"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    """By the field, with its value and what would be right."""
    with pytest.raises(error, match=message):
        from_config(config)


@pytest.mark.parametrize("block", [(10**30, 10**30), (10**12, 16), (16, 1 << 63)])
def test_blocks_larger_than_the_weight_are_cut(block: tuple[int, int]) -> None:
    """They take no memory but the weight's."""
    codes = codes_of(32, 48, 0)
    count = (-(-32 // block[0]), -(-48 // block[1]))
    tensors = {"weight": codes, "weight_scale_inv": torch.full(count, 0.5)}
    read = from_config({"weight_block_size": [*block]}).read(MODULE, tensors, (32, 48))
    assert torch.equal(dequantize(read), codes.float() * 0.5)


def _damaged() -> list[tuple[dict[str, torch.Tensor | None], str]]:
    nan = codes_of(32, 48, 0)
    nan.view(torch.uint8)[5, 6] = 0xFF
    return [
        ({"weight": None}, "weight is missing"),
        ({"weight": torch.zeros(32, 48)}, "must be under 'modules_to_not_convert'"),
        ({"weight": torch.zeros(32, 48).to(torch.float8_e5m2)}, "float8_e4m3fn is needed"),
        ({"weight": torch.zeros(32, 48).byte()}, "has the dtype uint8, float8_e4m3fn is needed"),
        ({"weight": codes_of(48, 32, 0)}, r"\[48, 32\], \[32, 48\] is needed"),
        ({"weight": nan}, r"weight has NaN at \[5, 6\]"),
        ({"weight_scale_inv": None}, "both missing"),
        ({"weight_scale": torch.ones(2, 3)}, "both there"),
        ({"weight_scale_inv": torch.ones(3, 2)}, r"\[2, 3\] is needed: .* 16 by 16 block"),
        ({"weight_scale_inv": torch.ones(2, 3).byte()}, "float32 or"),
        ({"weight_scale_inv": torch.full((2, 3), float("inf"))}, r"has inf at \[0, 0\]"),
        ({"weight_scale_inv": torch.ones(0, 3)}, "holds no value"),
        ({"input_scale": torch.tensor(float("nan"))}, "input_scale has nan"),
        ({"activation_scale": torch.ones(3)}, "one value above 0"),
    ]


@pytest.mark.parametrize(("changes", "message"), _damaged())
def test_damaged_fp8_tensors_are_refused(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    """By the kind, with what it has and what it needs."""
    tensors = {"weight": codes_of(32, 48, 0), "weight_scale_inv": torch.ones(2, 3)}
    for kind, tensor in changes.items():
        tensors.pop(kind, None)
        if tensor is not None:
            tensors[kind] = tensor
    with pytest.raises(ModelLoadError, match=message):
        from_config({"weight_block_size": [16, 16]}).read(MODULE, tensors, (32, 48))


def test_scales_that_fit_no_part_are_refused() -> None:
    """What a scale of three is for, nobody says."""
    tensors = {"weight": codes_of(6, 10, 0), "weight_scale": torch.arange(1.0, 4)}
    with pytest.raises(ModelLoadError, match=r"\[3\]; \[\], \[1\] or \[6, 1\] is needed"):
        from_config({}).read("model.layers.0.self_attn.qkv_proj", tensors, (6, 10))
