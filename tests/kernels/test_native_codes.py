"""Products with weights in integer codes, against what the codes stand for, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from coded_weights import Draw, coded_weights
from hypothesis import example, given
from hypothesis import strategies as st
from isas import instruction_sets, use_isa

from quire.kernels import Backend, available_backends
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize, round_activations

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(
    weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None, threads: int = 1
) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return PackedLinear(weight, bias)(x)
    finally:
        torch.set_num_threads(before)


def lost_by_rounding(weight: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    """Half a step of 16 bits for each input, by the largest of its group, times the weight."""
    plain = dequantize(weight).double()
    if weight.input_factors is not None:
        x, plain = x * weight.input_factors, plain / weight.input_factors
    if weight.order is not None:
        x, plain = x[:, weight.order], plain[:, weight.order]
    steps = torch.cat(
        [
            group.abs().amax(1, keepdim=True).expand_as(group)
            for group in x.double().split(weight.group_size, dim=1)
        ],
        dim=1,
    )
    return steps @ plain.abs().T * (2.0**-16 * 1.001)


def assert_right(
    result: torch.Tensor, weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None
) -> None:
    plain, rounded = dequantize(weight).double(), round_activations(x, weight).double()
    exact, sizes = rounded @ plain.T, rounded.abs() @ plain.abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    bound = sizes * (weight.in_features // 8 + 8) * 2.0**-24 + 1e-25
    if weight.activations == "float":
        bound += lost_by_rounding(weight, x)
    assert ((result - exact).abs() <= bound).all()


@given(
    draw=coded_weights(),
    rows=st.integers(1, 40),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
)
@example(Draw("int4", 384, 33, 64, True, True, True, "float", None, 1), 34, True, 2)
@example(Draw("int8", 320, 48, -1, False, False, False, "int8", None, 2), 67, False, 2)
@example(Draw("int8", 128, 17, 64, True, False, False, "int8", 0.017, 3), 100, True, 1)
def test_a_product_is_that_of_what_the_codes_stand_for(
    isa: str, draw: Draw, rows: int, has_bias: bool, threads: int
) -> None:
    """An input loses half a step of 16 bits, or what the format rounds it to; sums are float32's.

    And a row has the same bits alone and among others, on any number of threads.
    """
    weight = draw.weight()
    x = normal(draw.seed, rows, draw.in_features)
    bias = normal(draw.seed + 1, draw.out_features) if has_bias else None
    result = multiply(weight, x, bias, threads)
    assert_right(result, weight, x, bias)
    assert torch.equal(multiply(weight, x, bias, 3 - threads % 3), result)
    for row in range(0, rows, 5):
        assert torch.equal(multiply(weight, x[row : row + 1], bias)[0], result[row])


@given(
    draw=coded_weights(max_in=150),
    group_size=st.sampled_from([None, 20]),
    rows=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_backend_multiplies_coded_weights(
    backend: Backend, draw: Draw, group_size: int | None, rows: int, dtype: torch.dtype
) -> None:
    """As the codes say, in the type of the input; also where native kernels know no such groups."""
    if group_size is not None:
        draw = replace(draw, group_size=group_size)
    weight, x = draw.weight(), normal(draw.seed, rows, draw.in_features).to(dtype)
    result = backend.quantized_linear(x, weight)
    assert result.dtype == dtype
    plain, rounded = dequantize(weight).double(), round_activations(x, weight).double()
    bound = rounded.abs() @ plain.abs().T * 2.0**-8 + lost_by_rounding(weight, x.float())
    assert ((result - rounded @ plain.T).abs() <= bound).all()


@given(draw=coded_weights(), rows=st.sampled_from([1, 3, 7, 20, 50]))
def test_all_instruction_sets_have_the_same_bits(draw: Draw, rows: int) -> None:
    """The integers are the same everywhere; so is the rest where a * b + c is rounded once."""
    weight, x = draw.weight(), normal(draw.seed, rows, draw.in_features)
    results = []
    for name in instruction_sets():
        if name != "generic":
            with use_isa(name):
                results.append(multiply(weight, x))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_the_largest_sums_do_not_overflow(isa: str) -> None:
    """All codes, inputs and zeros at their ends: a unit's sum is an integer of 32 bits still."""
    for rows in (1, 5, 40):
        for code, zero in ((-128, 256), (127, -256)):
            weight = QuantizedWeight(
                kind="int8",
                codes=torch.full((20, 256), code, dtype=torch.int8),
                scales=torch.ones(20, 2),
                in_features=256,
                group_size=128,
                zeros=torch.full((20, 2), zero, dtype=torch.int16),
            )
            result = multiply(weight, torch.full((rows, 256), -3.0))
            assert torch.equal(result, torch.full((rows, 20), -3.0 * 256 * (code - zero)))
        for kind, code, value in (("int8", -128, -128), ("int8", 127, 127), ("int4", 0, -8)):
            dtype, width = (torch.int8, 512) if kind == "int8" else (torch.uint8, 256)
            codes, scales = torch.full((20, width), code, dtype=dtype), torch.ones(20, 1)
            weight = QuantizedWeight(kind, codes, scales, in_features=512, group_size=512)
            result = multiply(weight, torch.full((rows, 512), -3.0))
            assert torch.equal(result, torch.full((rows, 20), -3.0 * 512 * value))


@given(draw=coded_weights(max_in=150), rows=st.sampled_from([2, 9, 20]))
def test_numbers_that_are_none_stay_in_their_row_of_a_coded_product(
    isa: str, draw: Draw, rows: int
) -> None:
    """NaN in one row of the factor makes it NaN, and reaches no other row."""
    weight, x = draw.weight(), normal(draw.seed, rows, draw.in_features)
    expected = multiply(weight, x)
    x[1, draw.seed % draw.in_features] = torch.nan
    broken = multiply(weight, x)
    assert torch.isnan(broken[1]).all()
    rest = [row for row in range(rows) if row != 1]
    assert torch.equal(broken[rest], expected[rest])


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_rounded_to_8_bits_is_no_number_where_an_input_is_none(
    backend: Backend, value: float, scale: float | None
) -> None:
    """A fixed step does not cut an infinity off to a number, and its row is the only one."""
    draw = Draw("int8", 100, 20, -1, False, False, False, "int8", scale, 5)
    weight, x = draw.weight(), normal(5, 3, 100)
    expected = backend.quantized_linear(x, weight)
    x[1, 7] = value
    broken = backend.quantized_linear(x, weight)
    assert not torch.isfinite(broken[1]).any()
    assert torch.equal(broken[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e30])
def test_rows_of_any_size_are_multiplied(isa: str, size: float) -> None:
    """Zeros stay zeros; what is too small to have a step counts as nothing."""
    draw = Draw("int4", 200, 40, 64, True, False, False, "float", None, 7)
    weight, x = draw.weight(), normal(7, 10, 200) * size
    result = multiply(weight, x)
    assert torch.isfinite(result).all()
    if size != 1e-38:
        assert_right(result, weight, x, None)
