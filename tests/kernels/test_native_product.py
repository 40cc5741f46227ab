"""Products with packed weights, against float64, over drawn shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isas import rounds_activations

from quire.kernels import available_backends
from quire.kernels.cpu.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_threads: int = 2
) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return PackedLinear(weight, bias)(x)
    finally:
        torch.set_num_threads(before)


def assert_right(
    result: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bound: float,
) -> None:
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact += bias.double()
        sizes += bias.double().abs()
    assert ((result - exact).abs() <= bound * sizes + 1e-30).all()


@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 150).map(lambda n: 2 * n),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from(sorted(DTYPES)),
    has_bias=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_right_to_the_rounding_of_float32(
    isa: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: str,
    has_bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    """The error of a sum of n products is at most n units in the last place of their sizes.

    Where activations are rounded to bfloat16, that holds of the rounded ones, and the whole error
    is at most one bfloat16 unit of the sizes more.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator).to(DTYPES[dtype])
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    result = multiply(x, weight, bias, num_threads)
    steps = (in_features + 1) * 2.0**-24
    if dtype == "bfloat16" and rounds_activations(isa):
        assert_right(result, x, weight, bias, 2.0**-8 + 2 * steps)
        assert_right(result, x.bfloat16(), weight, bias, steps)
    else:
        assert_right(result, x, weight, bias, steps)
    for row in range(0, rows, 7):
        assert torch.equal(multiply(x[row : row + 1].contiguous(), weight, bias)[0], result[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_stay_in_their_row(isa: str, dtype: str) -> None:
    """NaN and infinity in one row of the factor reach no other row."""
    x = torch.randn(9, 32)
    weight = torch.randn(20, 32).to(DTYPES[dtype])
    expected = multiply(x, weight, None)
    x[4, 5], x[4, 6] = torch.inf, torch.nan
    broken = multiply(x, weight, None)
    assert torch.isnan(broken[4]).all()
    rest = [row for row in range(9) if row != 4]
    assert torch.equal(broken[rest], expected[rest])
