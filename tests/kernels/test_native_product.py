"""Products with packed weights, against float64, over drawn shapes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import available_backends, get_backend
from quire.kernels.cpu import structs

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_threads: int = 2
) -> torch.Tensor:
    """``x @ weight.T + bias`` by the library, through a model that is nothing but its head."""
    library = get_backend("cpu", "cpu").library
    out_features, in_features = weight.shape
    dtype = structs.DTYPES[str(weight.dtype).removeprefix("torch.")]
    packed = weight.clone()
    tail = torch.zeros(structs.BLOCK * in_features, dtype=weight.dtype)
    padded = None
    if bias is not None:
        padded = torch.nn.functional.pad(bias, (0, -out_features % structs.BLOCK))
    assert not library.quire_pack(
        packed.data_ptr(), out_features, in_features, dtype, tail.data_ptr(), num_threads
    )
    model = structs.Model()
    model.hidden_size = in_features
    model.head = structs.Matrix(
        packed.data_ptr(),
        tail.data_ptr(),
        None if padded is None else padded.data_ptr(),
        in_features,
        out_features,
        dtype,
    )
    result = torch.full((x.shape[0], out_features), torch.nan)
    context = library.quire_context_new()
    try:
        assert not library.quire_logits(
            context,
            ctypes.byref(model),
            x.data_ptr(),
            x.shape[0],
            result.data_ptr(),
            num_threads,
        )
    finally:
        library.quire_context_free(context)
    return result


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
    rows: int,
    in_features: int,
    out_features: int,
    dtype: str,
    has_bias: bool,
    num_threads: int,
    seed: int,
) -> None:
    """The error of a sum of n products is at most n units in the last place of their sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator).to(DTYPES[dtype])
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    result = multiply(x, weight, bias, num_threads)
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact += bias.double()
        sizes += bias.double().abs()
    assert ((result - exact).abs() <= (in_features + 1) * 2.0**-24 * sizes + 1e-30).all()
    for row in range(0, rows, 7):
        assert torch.equal(multiply(x[row : row + 1].contiguous(), weight, bias)[0], result[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_stay_in_their_row(dtype: str) -> None:
    """NaN and infinity in one row of the factor reach no other row."""
    x = torch.randn(9, 32)
    weight = torch.randn(20, 32).to(DTYPES[dtype])
    expected = multiply(x, weight, None)
    x[4, 5], x[4, 6] = torch.inf, torch.nan
    broken = multiply(x, weight, None)
    assert torch.isnan(broken[4]).all()
    rest = [row for row in range(9) if row != 4]
    assert torch.equal(broken[rest], expected[rest])
