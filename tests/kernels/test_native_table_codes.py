"""Native products of weights that are entries of tables: on whole numbers, by a step for each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from float_coded_weights import draw_weight, outlier_sizes
from hypothesis import given
from hypothesis import strategies as st
from isas import instruction_sets, use_isa

from quire.kernels import available_backends
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

KINDS = ("table", "tables")
MOST = 127 * 256 + 127
"""The largest whole number, of inputs and of entries: its upper byte, rounded, is 127."""

weights = st.builds(
    draw_weight,
    kind=st.sampled_from(KINDS),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 300),
    group_size=st.sampled_from((None, 8, 24, 32, 64, 80, 128, 256)),
    seed=st.integers(0, 2**32 - 1),
    has_order=st.booleans(),
    has_factors=st.booleans(),
    has_outliers=st.booleans(),
)


def multiply(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    num_threads: int = 1,
) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return PackedLinear(weight, bias)(x)
    finally:
        torch.set_num_threads(before)


def halves(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A whole number as 256 * upper + lower, both with a sign."""
    upper = (number + 128) >> 8
    return upper, number - 256 * upper


def entries(weight: QuantizedWeight) -> torch.Tensor:
    """Each output's table."""
    assert weight.table is not None
    return weight.table if weight.table.dim() == 2 else weight.table.expand(weight.out_features, 16)


def lost_by_rounding(weight: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    """Half a step of each input and of each entry, and the product of their lower bytes."""
    x = x.double().abs()
    if weight.input_factors is not None:
        x = x * weight.input_factors.double()
    largest_input = x.amax(1, keepdim=True)
    largest_entry = entries(weight).double().abs().amax(1)
    scale = weight.scales.double().abs().amax(1)
    half_steps = 2 * weight.in_features * 0.5 / MOST
    lower_bytes = weight.in_features * (128 / MOST) ** 2
    return largest_input * largest_entry * scale * (half_steps + lower_bytes) * 1.001


@given(
    weight=weights,
    rows=st.integers(1, 40),
    has_bias=st.booleans(),
    num_threads=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_nearly_those_of_the_tables(
    isa: str, weight: QuantizedWeight, rows: int, has_bias: bool, num_threads: int, seed: int
) -> None:
    """To what 16 bits lose; and of each row alone, bit for bit what it is in company."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, weight.in_features, generator=generator)
    bias = torch.randn(weight.out_features, generator=generator) if has_bias else None
    result = multiply(x, weight, bias, num_threads)
    plain = dequantize(weight).double()
    exact, sizes = x.double() @ plain.T, x.double().abs() @ plain.abs().T
    if weight.outliers is not None:
        sizes += x.double().abs() @ outlier_sizes(weight).T
    if bias is not None:
        exact += bias.double()
        sizes += bias.double().abs()
    bound = lost_by_rounding(weight, x) + (weight.in_features + 5) * 2.0**-23 * sizes + 1e-30
    assert ((result - exact).abs() <= bound).all()
    for row in range(0, rows, 7):
        assert torch.equal(multiply(x[row : row + 1], weight, bias)[0], result[row])
    for some in (2, 3, 4, 17, 33):
        assert torch.equal(multiply(x[:some], weight, bias), result[:some])


@given(weight=weights, rows=st.integers(1, 40))
def test_all_instruction_sets_have_the_same_bits_of_tables(
    weight: QuantizedWeight, rows: int
) -> None:
    """Whole numbers are the same everywhere; so is the rest where a * b + c is rounded once."""
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows))
    results = []
    for name in instruction_sets():
        if name != "generic":
            with use_isa(name):
                results.append(multiply(x, weight))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@given(
    kind=st.sampled_from(KINDS),
    in_features=st.integers(1, 64),
    rows=st.sampled_from([1, 3, 4, 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_unit_is_summed_up_exactly(
    isa: str, kind: str, in_features: int, rows: int, seed: int
) -> None:
    """Bit for bit what the definition says, in integers, and rounded a few times in the end."""
    weight = draw_weight(kind, 20, in_features, None, seed)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).numpy()
    steps = np.abs(x).max(1) / np.float32(MOST)
    # Where a * b + c is rounded once, what is brought to a whole number is not rounded before.
    product = np.float32 if isa == "generic" else np.float64
    inverses = (np.float32(1) / steps)[:, None]
    inputs = np.rint(np.multiply(x, inverses, dtype=product)).astype(np.int64)
    tables = entries(weight).double().numpy()
    largest = np.abs(tables).max(1)
    whole = np.rint(tables / largest[:, None] * MOST).astype(np.int64)
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), 2).flatten(1)[:, :in_features]
    of_codes = np.take_along_axis(whole, codes.long().numpy(), 1)
    (upper, lower), (input_upper, _) = halves(of_codes), halves(inputs)
    sums = inputs @ upper.T + input_upper @ lower.T
    scales = weight.scales[:, 0].numpy() * (256 * largest / MOST).astype(np.float32)
    expected = sums.astype(np.float32) * steps[:, None] * scales
    assert torch.equal(multiply(torch.from_numpy(x), weight), torch.from_numpy(expected))


@pytest.mark.parametrize("rows", [1, 3, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums_of_tables_do_not_overflow(isa: str, kind: str, rows: int) -> None:
    """All entries and inputs at their ends: a unit's sum is an integer of 32 bits still."""
    weight = draw_weight(kind, 20, 512, None, seed=1)
    assert weight.table is not None
    for entry in (-2.0, 2.0):
        full = replace(weight, table=torch.full_like(weight.table, entry), scales=torch.ones(20, 1))
        for size in (-3.0, 3.0):
            result = multiply(torch.full((rows, 512), size), full)
            expected = 512 * entry * size
            assert ((result / expected - 1).abs() <= (128 / MOST) ** 2).all()


@pytest.mark.parametrize("rows", [1, 3, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_stay_in_their_row_of_tables(isa: str, kind: str, rows: int) -> None:
    """Also where all the weight's entries are zero; and a row of zeros makes zeros."""
    weight = draw_weight(kind, 20, 200, None, seed=2, has_outliers=True)
    assert weight.table is not None
    for each in (weight, replace(weight, table=torch.zeros_like(weight.table), outliers=None)):
        x = torch.randn(rows + 1, 200, generator=torch.Generator().manual_seed(3))
        x[0] = 0
        expected = multiply(x, each)
        assert (expected[0] == 0).all()
        for value in (torch.nan, torch.inf, -torch.inf):
            broken = x.clone()
            broken[1, 77] = value
            result = multiply(broken, each)
            assert not result[1].isfinite().any()
            others = [row for row in range(rows + 1) if row != 1]
            assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_any_size_are_multiplied(isa: str, kind: str, size: float) -> None:
    """Under scales that bring what they make back to where numbers usually are."""
    weight = draw_weight(kind, 20, 200, None, seed=4)
    assert weight.table is not None
    weight.table.clamp_(-3, 3)
    sized = replace(
        weight, table=weight.table * size, scales=weight.scales * float(min(1 / size, 1e38))
    )
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(5))
    result, expected = multiply(x, sized), multiply(x, weight)
    assert ((result - expected).abs() <= 1e-4 * expected.abs().max()).all()
