"""Compressed-tensors: its own package writes and dequantizes; codes stand for the same here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError
from quire.kernels.reference.quantized import dequantize
from quire.quantization.compressed_tensors import from_config

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
    "int8 tensor": {"num_bits": 8, "strategy": "tensor"},
    "int8 group": {"num_bits": 8, "strategy": "group", "group_size": 8},
    "int4 group": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int4 tensor": {"num_bits": 4, "strategy": "tensor"},
    "int2 group": {"num_bits": 2, "strategy": "group", "group_size": 16},
    "fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8 block": {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 8],
    },
    "fp8 group": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 8},
}  # fmt: skip


def config_of(form: str, weights: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": "int", "symmetric": True, **weights},
                "input_activations": inputs or None,
            }
        },
        "ignore": ["lm_head"],
    }


def compressed(
    config: dict[str, Any], weight: torch.Tensor, **more: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the package makes of a weight, and reads of that again."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationConfig(**config).config_groups["group_0"]
    args = scheme.weights
    assert args is not None
    rows, columns = weight.shape
    if args.strategy == "tensor":
        grouped = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        grouped = weight.reshape(rows, 1, -1)
    elif args.strategy == "group":
        grouped = weight.reshape(rows, -1, args.group_size)
    else:
        height, width = args.block_structure
        pads = (0, -columns % width, 0, -rows % height)
        padded = torch.nn.functional.pad(weight, pads)
        blocks = padded.view(padded.shape[0] // height, height, -1, width)
        grouped = blocks.transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
    if args.strategy == "tensor":
        scale, zero = scale.flatten(), zero.flatten()
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, **more}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(tensors, scheme)["weight"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], torch.Tensor]:
    weights = dict(WEIGHTS[draw(st.sampled_from(sorted(WEIGHTS)))])
    floating = weights.get("type") == "float"
    if not floating:
        weights["symmetric"] = draw(st.booleans())
    forms = ["naive-quantized", "float-quantized" if floating else "int-quantized"]
    if not floating:
        forms += ["pack-quantized"] * 2
    form = draw(st.sampled_from(forms))
    # The package cannot read zeros of 4 bits that it packed into a single row.
    packed_zeros = form == "pack-quantized" and not weights.get("symmetric", True)
    rows = draw(st.integers(9 if packed_zeros else 1, 40))
    step = weights.get("group_size", 8 if weights["strategy"] == "block" else 1)
    columns = step * draw(st.integers(1, 64 // step))
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight = torch.randn(rows, columns) * 10 ** draw(st.integers(-2, 1))
    if draw(st.booleans()):
        weight = weight.abs()  # zero points far from the middle
    return config_of(form, weights), weight.to(dtype)


@given(case=cases())
def test_what_the_package_writes_is_read_as_it_reads_it(
    case: tuple[dict[str, Any], torch.Tensor],
) -> None:
    """Bit for bit, in every format and strategy, in the type of its scales."""
    config, weight = case
    tensors, expected = compressed(config, weight)
    chosen = from_config(config)
    kinds = chosen.kinds(MODULE)
    assert kinds is not None
    assert kinds.required <= set(tensors) <= kinds.required | kinds.optional
    before = {kind: tensor.clone() for kind, tensor in tensors.items()}
    read = chosen.read(MODULE, tensors, (weight.shape[0], weight.shape[1]))
    assert torch.equal(dequantize(read).to(expected.dtype), expected)
    owned = {each.untyped_storage().data_ptr() for each in read.tensors().values()}
    for kind, tensor in tensors.items():
        assert torch.equal(tensor.double(), before[kind].double()), kind
        assert tensor.untyped_storage().data_ptr() not in owned, kind


def test_inputs_of_int8_are_rounded_where_the_configuration_says_so() -> None:
    """Per token, or by a fixed scale; float8 inputs are finer than what is multiplied, and stay."""
    weight = torch.randn(8, 16)
    args: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    plain = config_of("int-quantized", WEIGHTS["int8 channel"])
    tensors, _ = compressed(plain, weight)
    tokens = config_of(
        "int-quantized", WEIGHTS["int8 channel"], **args, strategy="token", dynamic=True
    )
    fixed = config_of("int-quantized", WEIGHTS["int8 channel"], **args, strategy="tensor")
    scale = {"input_scale": torch.tensor([0.25], dtype=torch.bfloat16)}
    read = from_config(plain).read(MODULE, tensors, (8, 16))
    assert (read.activations, read.activation_scale) == ("float", None)
    read = from_config(tokens).read(MODULE, tensors, (8, 16))
    assert (read.activations, read.activation_scale) == ("int8", None)
    read = from_config(fixed).read(MODULE, tensors | scale, (8, 16))
    assert (read.activations, read.activation_scale) == ("int8", 0.25)
    kinds = from_config(fixed).kinds(MODULE)
    assert kinds is not None
    assert "input_scale" in kinds.required
    with pytest.raises(ModelLoadError, match="input_scale is missing"):
        from_config(fixed).read(MODULE, tensors, (8, 16))
    for values in ([0.25, 0.25], [-1.0], [float("nan")], [0.0], []):
        with pytest.raises(ModelLoadError, match="input_scale has"):
            from_config(fixed).read(
                MODULE, tensors | {"input_scale": torch.tensor(values)}, (8, 16)
            )
    floats = config_of(
        "float-quantized", WEIGHTS["fp8 channel"], num_bits=8, type="float", strategy="tensor"
    )
    tensors, _ = compressed(floats, weight)
    read = from_config(floats).read(MODULE, tensors | scale, (8, 16))
    assert (read.kind, read.activations, read.activation_scale) == ("fp8", "float", None)
    with pytest.raises(ModelLoadError, match="input_scale has nan"):
        from_config(floats).read(
            MODULE, tensors | {"input_scale": torch.tensor(float("nan"))}, (8, 16)
        )


@given(
    seed=st.integers(0, 99),
    num_groups=st.integers(1, 5),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
)
def test_columns_have_the_group_that_the_index_gives_them(
    seed: int, num_groups: int, bits: int, symmetric: bool
) -> None:
    """`weight_g_idx`, by its definition: newer releases of the package do not write it."""
    torch.manual_seed(seed)
    weights = {
        "num_bits": bits, "strategy": "group", "group_size": 8, "actorder": "group",
        "symmetric": symmetric,
    }  # fmt: skip
    config = config_of("pack-quantized", weights)
    plain = config_of("pack-quantized", {**weights, "actorder": None})
    columns = num_groups * 8
    tensors, _ = compressed(plain, torch.randn(11, columns))
    index = (torch.arange(columns) // 8)[torch.randperm(columns)]
    read = from_config(config).read(
        MODULE, tensors | {"weight_g_idx": index.to(torch.int32)}, (11, columns)
    )
    # One group of one column each: what the values are without any scale.
    unscaled = dict(tensors, weight_scale=torch.ones_like(tensors["weight_scale"]))
    unscaled.pop("weight_zero_point", None)
    ones = config_of("pack-quantized", {**weights, "actorder": None, "symmetric": True})
    values = dequantize(from_config(ones).read(MODULE, unscaled, (11, columns)))
    zeros = torch.zeros(11, num_groups)
    if not symmetric:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        zeros = unpack_from_int32(
            tensors["weight_zero_point"], bits, torch.Size([11, num_groups]), packed_dim=0
        ).float()
    expected = (values - zeros[:, index]) * tensors["weight_scale"][:, index]
    assert torch.equal(dequantize(read), expected)


def test_an_index_without_an_order_has_none() -> None:
    """Groups of neighbours, or the -1 that the tensor is made with."""
    config = config_of("pack-quantized", WEIGHTS["int4 group"])
    tensors, expected = compressed(config, torch.randn(4, 32))
    for index in (torch.arange(32) // 16, torch.full((32,), -1)):
        read = from_config(config).read(MODULE, tensors | {"weight_g_idx": index}, (4, 32))
        assert read.order is None
        assert torch.equal(dequantize(read), expected)


def _damaged() -> list[tuple[str, dict[str, torch.Tensor | None], str]]:
    nan = torch.full((8, 2), float("nan"))
    return [
        ("int4 group", {"weight_packed": torch.zeros(8, 3, dtype=torch.int32)}, r"\[8, 4\]"),
        ("int4 group", {"weight_packed": torch.zeros(8, 4, dtype=torch.int64)}, "int32 is needed"),
        ("int4 group", {"weight_packed": None}, "weight_packed is missing"),
        ("int4 group", {"weight_shape": torch.tensor([32, 8])}, r"weight_shape says \[32, 8\]"),
        ("int4 group", {"weight_shape": torch.tensor([8])}, "weight_shape has the shape"),
        ("int4 group", {"weight_scale": nan}, "weight_scale has nan"),
        ("int4 group", {"weight_scale": nan / 0}, "weight_scale has nan"),
        ("int4 group", {"weight_scale": torch.full((8, 2), 1e300, dtype=torch.float64)}, "has inf"),
        ("int4 group", {"weight_scale": None}, "weight_scale is missing"),
        ("int4 group", {"weight_scale": torch.ones(0)}, "holds no value"),
        ("int4 group", {"weight_scale": torch.ones(8, 1)}, r"\[8, 2\] is needed: .*group with 16"),
        ("int4 group", {"weight_scale": torch.ones(2, 8)}, r"\[8, 2\] is needed"),
        ("int4 group", {"weight_scale": torch.ones(8, 2).int()}, "float32 or .* is needed"),
        ("int4 group", {"weight_zero_point": torch.ones(1, 2).int()}, "says symmetric"),
        ("int4 group", {"weight_g_idx": torch.full((32,), 2)}, "groups from 0 to 1"),
        ("int4 group", {"weight_g_idx": torch.zeros(32).int()}, "gives group 0 32 inputs"),
        ("int4 group", {"weight_g_idx": torch.zeros(31).int()}, r"\[32\] is needed"),
        ("int8 channel", {"weight": torch.zeros(8, 32)}, "must be under 'ignore'"),
        ("int8 channel", {"weight": torch.zeros(32, 8).char()}, r"\[8, 32\] is needed"),
        ("int8 channel", {"weight_scale": torch.ones(2)}, "strategy is channel"),
        ("int8 tensor", {"weight_scale": torch.ones(2)}, "strategy is tensor"),
        ("fp8 channel", {"weight": torch.zeros(8, 32).to(torch.float8_e5m2)}, "float8_e4m3fn is"),
        ("fp8 channel", {"weight": torch.zeros(8, 32).byte()}, "float8_e4m3fn is needed"),
        ("fp8 block", {"weight_scale": torch.ones(2, 2)}, r"\[1, 4\] is needed: .*16 by 8"),
    ]


@pytest.mark.parametrize(("name", "changes", "message"), _damaged())
def test_damaged_tensors_are_refused(
    name: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    """By the kind, with what it has and what it needs."""
    floating = "fp8" in name
    form = "float-quantized" if floating else "int-quantized"
    config = config_of("pack-quantized" if "int4" in name else form, WEIGHTS[name])
    tensors, _ = compressed(config, torch.randn(8, 32))
    for kind, tensor in changes.items():
        tensors.pop(kind, None)
        if tensor is not None:
            tensors[kind] = tensor
    with pytest.raises(ModelLoadError, match=message):
        from_config(config).read(MODULE, tensors, (8, 32))


@pytest.mark.parametrize(
    ("form", "zeros", "message"),
    [
        ("pack-quantized", torch.zeros(1, 2).int(), r"\[2, 2\] is needed: 4 bits for each of 16"),
        ("pack-quantized", torch.full((16, 2), 8).char(), "-8 to 7"),
        ("pack-quantized", torch.zeros(16, 1).char(), "that of weight_scale"),
        ("int-quantized", torch.ones(2, 16).char(), r"\[2, 16\], that of weight_scale"),
        ("int-quantized", torch.zeros(16, 2), "int8 or .* is needed"),
        ("int-quantized", torch.full((16, 2), -9), "-8 to 7"),
    ],
)
def test_damaged_zeros_are_refused(form: str, zeros: torch.Tensor, message: str) -> None:
    """Packed or not, in the bits of the codes."""
    config = config_of(form, {**WEIGHTS["int4 group"], "symmetric": False})
    tensors, _ = compressed(config, torch.randn(16, 32))
    with pytest.raises(ModelLoadError, match=message):
        from_config(config).read(MODULE, tensors | {"weight_zero_point": zeros}, (16, 32))


def test_codes_that_are_no_numbers_are_refused() -> None:
    """Float8 has two codes for NaN, and none for infinity."""
    config = config_of("float-quantized", WEIGHTS["fp8 channel"])
    tensors, _ = compressed(config, torch.randn(8, 32))
    for code in (0x7F, 0xFF):
        weight = tensors["weight"].clone()
        weight.view(torch.uint8)[3, 4] = code
        with pytest.raises(ModelLoadError, match=r"weight has NaN at \[3, 4\]"):
            from_config(config).read(MODULE, tensors | {"weight": weight}, (8, 32))


def test_a_group_size_has_to_divide_the_inputs() -> None:
    """The format's own package does not read another either."""
    config = config_of("pack-quantized", WEIGHTS["int4 group"])
    tensors, _ = compressed(config, torch.randn(8, 32))
    with pytest.raises(ModelLoadError, match="group_size 16 does not divide the 40 inputs"):
        from_config(config).read(MODULE, tensors, (8, 40))
