"""Rounding plain weights: every code is the nearest; damaged values are named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ModelLoadError
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.quantization.error_compensation import round_compensated
from quire.quantization.rounding import NF4, Grid, round_fp8, round_int4, round_int8, round_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Values of all sizes, some rows and columns of zeros among them."""
    rows, columns = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weight = torch.randn(rows, columns, generator=generator) * 10 ** draw(st.integers(-4, 2))
    weight *= torch.rand(rows, 1, generator=generator) > 0.2
    weight[:, : draw(st.integers(0, columns))] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    return weight.to(draw(st.sampled_from(DTYPES)))


def spread(weight: QuantizedWeight, values: torch.Tensor) -> torch.Tensor:
    """One value for each group, brought to all columns."""
    return values[:, torch.arange(weight.in_features) // weight.group_size]


@given(weights())
def test_int8_errs_by_half_a_step_and_keeps_the_largest(weight: torch.Tensor) -> None:
    made, plain = round_int8(weight), weight.float()
    assert made.codes.abs().max() <= 127
    step = made.scales * (1 + 1e-5)
    assert ((dequantize(made) - plain).abs() <= step / 2).all()
    largest = plain.abs().amax(1)
    assert torch.allclose(dequantize(made).abs().amax(1), largest, rtol=1e-6, atol=0)


@given(weights())
def test_fp8_errs_by_a_sixteenth_of_the_value(weight: torch.Tensor) -> None:
    """Three bits behind the leading one; below 2^-6 of the scale, steps are of one size."""
    made, plain = round_fp8(weight), weight.float()
    bound = torch.maximum(plain.abs() / 16, made.scales * 2**-10) * (1 + 1e-5)
    assert dequantize(made).isfinite().all()
    assert ((dequantize(made) - plain).abs() <= bound).all()


@given(weights(), st.integers(1, 80))
def test_nf4_takes_the_nearest_entry_of_the_table(weight: torch.Tensor, size: int) -> None:
    made, plain = round_nf4(weight, size), weight.float()
    scaled = plain / spread(made, made.scales)
    nearest = (scaled[..., None] - torch.tensor(NF4)).abs().amin(2)
    got = (dequantize(made) / spread(made, made.scales) - scaled).abs()
    assert (got <= nearest + 1e-5).all()


@given(
    weights(),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_int4_takes_the_nearest_of_its_codes(
    weight: torch.Tensor, size: int, symmetric: bool, clip: bool, scale_dtype: torch.dtype
) -> None:
    """With the scale as it is kept; without a search every value errs by half a step at most."""
    made = round_int4(weight, Grid(size, symmetric, clip, scale_dtype))
    plain = weight.float()
    assert torch.equal(made.scales.to(scale_dtype).float(), made.scales)
    zeros = torch.full_like(made.scales, 8) if made.zeros is None else made.zeros.float()
    assert (made.zeros is None) == symmetric
    scaled = plain / spread(made, made.scales) + spread(made, zeros)
    nearest = (scaled[..., None] - torch.arange(16)).abs().amin(2)
    got = dequantize(made) / spread(made, made.scales) + spread(made, zeros) - scaled
    assert (got.abs() <= nearest + 1e-4).all()
    if not clip and scale_dtype == torch.float32:
        # The zero is rounded, too: at the ends of the range by half a step more.
        assert ((dequantize(made) - plain).abs() <= spread(made, made.scales) * 1.001).all()


@given(weights(), st.integers(1, 80), st.booleans())
def test_a_search_of_ranges_never_makes_the_error_larger(
    weight: torch.Tensor, size: int, symmetric: bool
) -> None:
    errors = []
    for clip in (False, True):
        made = round_int4(weight, Grid(size, symmetric, clip))
        errors.append((dequantize(made) - weight.float()).square().sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-30).all()


@given(weights(), st.integers(1, 80), st.booleans())
def test_zeros_stay_zeros(weight: torch.Tensor, size: int, symmetric: bool) -> None:
    for made in (round_int4(weight, Grid(size, symmetric)), round_int8(weight), round_nf4(weight)):
        assert (dequantize(made)[weight == 0] == 0).all()
        assert made.scales.isfinite().all()


def test_factors_are_divided_out_of_the_weight() -> None:
    """What is dequantized, factors and all, is the weight again."""
    torch.manual_seed(0)
    weight, factors = torch.randn(8, 64), torch.rand(64) + 0.5
    made = round_int4(weight, Grid(32), factors)
    plain = round_int4(weight / factors, Grid(32))
    assert torch.equal(made.codes, plain.codes)
    assert torch.equal(dequantize(made), dequantize(plain) * factors)


@given(weights(), st.integers(1, 4), st.booleans(), st.booleans())
def test_compensated_rounding_without_inputs_is_plain_rounding(
    weight: torch.Tensor, groups: int, symmetric: bool, by_importance: bool
) -> None:
    """Where no input was ever anything, no column can make good for another."""
    if weight.shape[1] % groups:
        groups = 1
    grid = Grid(weight.shape[1] // groups, symmetric)
    inputs = torch.zeros(3, weight.shape[1])
    made = round_compensated(weight, inputs, grid, by_importance=by_importance)
    assert torch.equal(dequantize(made), dequantize(round_int4(weight, grid)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_no_number_is_named(value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 8192).to(dtype)
    weight[37, 5] = value
    ways = (
        round_int8,
        round_fp8,
        round_nf4,
        lambda each: round_int4(each, Grid(128)),
        lambda each: round_compensated(each, torch.ones(1, 8192), Grid(8192)),
    )
    for way in ways:
        with pytest.raises(ModelLoadError, match=f"has the value {value} in row 37, column 5"):
            way(weight)


def test_a_value_that_float32_cannot_hold_is_named() -> None:
    weight = torch.ones(2, 2, dtype=torch.float64)
    weight[1, 0] = 1e300
    with pytest.raises(ModelLoadError, match=r"has the value 1e\+300 in row 1, column 0"):
        round_int8(weight)


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 2, dtype=torch.int8), torch.zeros(4), torch.zeros(2, 0)]
)
def test_what_is_no_plain_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ModelLoadError, match="the shape"):
        round_int8(weight)


def test_a_scale_that_its_type_cannot_hold_is_refused() -> None:
    """And not cut off, which would make another weight of it."""
    with pytest.raises(ModelLoadError, match="scales are kept in float16"):
        round_int4(torch.full((1, 8), 3e6), Grid(8, scale_dtype=torch.float16))


def test_the_largest_and_smallest_floats_can_be_rounded() -> None:
    for size in (3e38, 1e-38, 1e-44):
        weight = torch.tensor([[size, -size, 0.0, size / 2]])
        for made in (round_int8(weight), round_int4(weight, Grid(4)), round_fp8(weight)):
            assert made.scales.isfinite().all()
            assert dequantize(made).isfinite().all()
