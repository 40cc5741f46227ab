"""Native products of tables of outputs in bfloat16 models: weights and inputs are rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from float_coded_weights import draw_weight, outlier_sizes
from hypothesis import given
from hypothesis import strategies as st
from isas import instruction_sets, use_isa

from quire.kernels import available_backends
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.models.adapter import DeltaSlice, LinearDelta

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

weights = st.builds(
    draw_weight,
    kind=st.just("tables"),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 400),
    group_size=st.none(),
    seed=st.integers(0, 2**32 - 1),
    has_order=st.booleans(),
    has_factors=st.booleans(),
    has_outliers=st.booleans(),
)


def multiply(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, num_threads: int = 1
) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return PackedLinear(weight, bias, rounds_inputs=True)(x)
    finally:
        torch.set_num_threads(before)


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To bfloat16, which products by tiles take for zero where it is subnormal."""
    result = numbers.float().bfloat16().double()
    return torch.where(result.abs() < torch.finfo(torch.float32).tiny, 0.0, result)


def definition(x: torch.Tensor, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """What weights and inputs make that were rounded, but for outliers; and its sums of sizes."""
    inputs, plain = x.float(), replace(weight, outliers=None, input_factors=None)
    if weight.input_factors is not None:
        inputs = inputs * weight.input_factors
    products = (rounded(inputs), rounded(dequantize(plain)))
    exact, sizes = products[0] @ products[1].T, products[0].abs() @ products[1].abs().T
    if weight.outliers is not None:
        both = replace(weight, input_factors=None)
        exact += inputs.double() @ (dequantize(both).double() - dequantize(plain).double()).T
        sizes += (
            2 * x.double().abs() @ (dequantize(weight).double().abs() + outlier_sizes(weight)).T
        )
    return exact, sizes


def has_tiles(isa: str) -> bool:
    return isa.startswith("amx")


@given(
    weight=weights,
    rows=st.integers(1, 40),
    has_bias=st.booleans(),
    num_threads=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_those_of_rounded_weights_and_inputs(
    isa: str, weight: QuantizedWeight, rows: int, has_bias: bool, num_threads: int, seed: int
) -> None:
    """To the rounding of float32 by tiles; elsewhere nothing is rounded so.

    And of each row alone, bit for bit what it is in company.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, weight.in_features, generator=generator)
    bias = torch.randn(weight.out_features, generator=generator) if has_bias else None
    result = multiply(x, weight, bias, num_threads)
    if has_tiles(isa):
        exact, sizes = definition(x, weight)
        if bias is not None:
            exact, sizes = exact + bias.double(), sizes + bias.double().abs()
        bound = (weight.in_features + 5) * 2.0**-23 * sizes + 1e-30
        assert ((result - exact).abs() <= bound).all()
    else:
        assert torch.equal(result, PackedLinear(weight, bias)(x))
    for row in range(0, rows, 7):
        assert torch.equal(multiply(x[row : row + 1], weight, bias)[0], result[row])


@pytest.mark.parametrize("in_features", [896, 1160])
@pytest.mark.parametrize("has_outliers", [False, True])
def test_rows_are_alone_what_they_are_in_company(
    isa: str, in_features: int, has_outliers: bool
) -> None:
    """However many they are: one tile of them, two, or groups that wait for each other."""
    weight = draw_weight("tables", 83, in_features, None, seed=1, has_outliers=has_outliers)
    x = torch.randn(300, in_features, generator=torch.Generator().manual_seed(2))
    linear = PackedLinear(weight, rounds_inputs=True)
    result = linear(x)
    for rows in (1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 48, 49, 129, 256, 257):
        assert torch.equal(linear(x[:rows]), result[:rows])
    for row in (17, 40, 299):
        assert torch.equal(linear(x[row : row + 1])[0], result[row])


@pytest.mark.parametrize("rows", [1, 3, 5, 20, 40])
def test_numbers_that_are_none_stay_in_their_row(isa: str, rows: int) -> None:
    """Where a tile is not full, and where it is."""
    weight = draw_weight("tables", 20, 200, None, seed=2, has_outliers=True)
    x = torch.randn(rows + 1, 200, generator=torch.Generator().manual_seed(3))
    expected = multiply(x, weight)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 77] = value
        result = multiply(broken, weight)
        assert not result[1].isfinite().any()
        others = [row for row in range(rows + 1) if row != 1]
        assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("rows", [1, 3, 20, 70])
def test_adapters_add_to_their_rows(isa: str, rows: int) -> None:
    """Rows without one have the bits of before."""
    weight = draw_weight("tables", 70, 96, None, seed=7)
    delta = LinearDelta(
        a=torch.randn(5, 96), scales=torch.rand(5), slices=(DeltaSlice(0, 0, torch.randn(70, 5)),)
    )
    x, slots = torch.randn(rows, 96), torch.arange(rows, dtype=torch.int32) % 2 - 1
    found = PackedLinear(weight, None, [delta], rounds_inputs=True)(x, slots)
    plain = multiply(x, weight)
    gain = F.linear(F.linear(x, delta.a) * delta.scales, delta.slices[0].b)
    has = slots >= 0
    assert torch.equal(found[~has], plain[~has])
    torch.testing.assert_close(found[has], (plain + gain)[has], rtol=1e-4, atol=1e-3)


def test_what_was_packed_for_tiles_is_multiplied_without_them() -> None:
    """By rounded weights still; the inputs stay as they are."""
    weight = draw_weight("tables", 40, 300, None, seed=8, has_order=True)
    x = torch.randn(5, 300).bfloat16().float()
    exact, sizes = definition(x, weight)
    for packer in filter(has_tiles, instruction_sets()):
        with use_isa(packer):
            linear = PackedLinear(weight, rounds_inputs=True)
        for name in instruction_sets():
            with use_isa(name):
                assert ((linear(x) - exact).abs() <= 305 * 2.0**-23 * sizes).all()


@pytest.mark.parametrize("size", [1e30, 3.4e38])
def test_entries_that_no_code_uses_may_be_too_large(size: float) -> None:
    """A column that fills up a step has an entry, times zero."""
    weight = draw_weight("tables", 20, 40, None, seed=9)
    assert weight.table is not None
    weight.codes.bitwise_or_(0x11)
    weight.table[:, 0] = size
    weight.scales.abs_().clamp_(min=2.0)
    for name in filter(has_tiles, instruction_sets()):
        with use_isa(name):
            assert multiply(torch.randn(4, 40), weight).isfinite().all()


def test_blocks_that_lie_otherwise_are_not_alike(isa: str) -> None:
    """A gate and what it lets by are gone over at once only where they lie alike."""
    library = load_library()
    weight = draw_weight("tables", 40, 300, None, seed=8)
    first, other = (PackedCodes(library, weight, rounds_inputs=each) for each in (True, False))
    assert first.is_like(first)
    assert first.is_like(other) is not has_tiles(isa)
