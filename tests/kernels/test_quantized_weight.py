"""QuantizedWeight: rows of it, several as one, and what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.quantized import Kind, Outliers, QuantizedWeight, concatenate
from quire.kernels.reference.quantized import (
    dequantize,
    quantized_embedding,
    quantized_linear,
    round_activations,
)

KINDS: tuple[Kind, ...] = ("int8", "int4", "fp8", "table4")


def random_weight(kind: Kind, rows: int, columns: int, group: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if kind == "int8":
        codes = integers(-128, 128, rows, columns).to(torch.int8)
    elif kind == "fp8":
        codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    else:
        codes = integers(0, 256, rows, (columns + 1) // 2).to(torch.uint8)
    num_groups = -(-columns // group)
    counts = integers(0, 3, rows).clamp(max=columns)
    first = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=first[1:])
    chosen = [torch.randperm(columns, generator=generator)[:n].sort().values for n in counts]
    places = torch.cat(chosen).to(torch.int32)
    return QuantizedWeight(
        kind,
        codes,
        torch.rand(rows, num_groups, generator=generator),
        columns,
        group,
        zeros=integers(0, 16, rows, num_groups).short() if kind in ("int8", "int4") else None,
        order=torch.randperm(columns, generator=generator),
        input_factors=torch.rand(columns, generator=generator),
        table=torch.randn(rows, 16, generator=generator) if kind == "table4" else None,
        outliers=Outliers(first, places, torch.randn(len(places), generator=generator)),
    )


WEIGHTS = st.builds(
    random_weight,
    st.sampled_from(KINDS),
    st.integers(1, 20),
    st.integers(1, 33),
    st.integers(1, 40),
    st.integers(0, 1000),
)


@given(WEIGHTS, st.integers(0, 40), st.integers(1, 40), st.booleans())
def test_some_inputs_of_a_weight_stand_for_what_they_did(
    weight: QuantizedWeight, first: int, count: int, is_ordered: bool
) -> None:
    """However groups, order and outliers are cut: so a weight can be shared out by its inputs."""
    if not is_ordered:
        weight = replace(weight, order=None)
    first = min(first, weight.in_features - 1)
    end = min(first + count, weight.in_features)
    part = weight.columns(first, end)
    assert torch.equal(dequantize(part), dequantize(weight)[:, first:end])
    assert part.scales.shape[1] == -(-part.in_features // part.group_size)
    if not is_ordered and first % weight.group_size == 0 == end % weight.group_size:
        assert part.group_size == weight.group_size or part.scales.shape[1] == 1


@pytest.mark.parametrize(("first", "end"), [(-1, 3), (2, 2), (0, 9), (8, 9)])
def test_inputs_that_are_not_there_are_refused(first: int, end: int) -> None:
    """By their numbers."""
    with pytest.raises(ValueError, match=f"inputs {first} to {end} of 8"):
        random_weight("int8", 2, 8, 4, 0).columns(first, end)


def value_of(weight: QuantizedWeight, row: int, column: int) -> float:
    """One number of a weight, by its definition, as slowly as it reads."""
    code: float
    if weight.kind in ("int8", "fp8"):
        code = float(weight.codes[row, column])
    else:
        byte = int(weight.codes[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
    group = column // weight.group_size
    if weight.kind == "table4":
        assert weight.table is not None
        code = float(weight.table[row, int(code)])
    elif weight.kind != "fp8":
        assert weight.zeros is not None
        code -= int(weight.zeros[row, group])
    return code * float(weight.scales[row, group])


@given(WEIGHTS)
def test_a_weight_is_what_its_definition_says(weight: QuantizedWeight) -> None:
    """Each number is its code's value, at the input that the order says, and its outlier."""
    expected = torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    assert weight.order is not None
    assert weight.outliers is not None
    assert weight.input_factors is not None
    for row in range(weight.out_features):
        for column in range(weight.in_features):
            expected[row, weight.order[column]] = value_of(weight, row, column)
        for entry in range(int(weight.outliers.first[row]), int(weight.outliers.first[row + 1])):
            expected[row, weight.outliers.columns[entry]] += weight.outliers.values[entry]
    expected *= weight.input_factors
    torch.testing.assert_close(dequantize(weight).double(), expected, rtol=1e-5, atol=1e-6)


@given(WEIGHTS, st.data())
def test_rows_of_a_weight_are_rows_of_what_it_stands_for(
    weight: QuantizedWeight, data: st.DataObject
) -> None:
    """Selecting and dequantizing may change places, and so does putting parts together."""
    whole = dequantize(weight)
    index = torch.tensor(data.draw(st.lists(st.integers(0, weight.out_features - 1), max_size=9)))
    index = index.long()
    assert torch.equal(dequantize(weight.select(index)), whole[index])
    cut = data.draw(st.integers(0, weight.out_features))
    joined = concatenate([weight.rows(0, cut), weight.rows(cut, weight.out_features)])
    assert joined is not None
    assert torch.equal(dequantize(joined), whole)
    ids = index % weight.out_features
    assert torch.equal(quantized_embedding(ids, weight, torch.float32), whole[ids])


@pytest.mark.parametrize(
    "change",
    [
        {"order": None},
        {"input_factors": None},
        {"kind": "int4"},
        {"activations": "int8"},
        {"group_size": 16},
    ],
)
def test_weights_that_differ_in_form_are_not_one(change: dict[str, object]) -> None:
    """Where one weight could not stand for both, the answer is None."""
    weight = random_weight("int8", 4, 32, 8, 0)
    assert concatenate([weight, replace(weight, **change)]) is None  # type: ignore[arg-type]


def test_a_common_table_and_tables_of_outputs_become_tables_of_outputs() -> None:
    """What a code means stays with its output."""
    one = replace(random_weight("table4", 4, 8, 8, 0), table=torch.arange(16.0), outliers=None)
    other = replace(random_weight("table4", 4, 8, 8, 0), outliers=None)
    joined = concatenate([one, other])
    assert joined is not None
    assert torch.equal(dequantize(joined), torch.cat([dequantize(one), dequantize(other)]))
    without_zeros = replace(random_weight("int4", 4, 8, 8, 0), zeros=None)
    joined = concatenate([without_zeros, random_weight("int4", 4, 8, 8, 0)])
    assert joined is not None
    assert torch.equal(dequantize(joined)[:4], dequantize(without_zeros))


@given(WEIGHTS, st.integers(0, 5), st.booleans())
def test_the_product_is_that_with_what_the_weight_stands_for(
    weight: QuantizedWeight, rows: int, has_bias: bool
) -> None:
    """The reference product agrees with a dense one, also with no rows."""
    x = torch.randn(rows, weight.in_features)
    bias = torch.randn(weight.out_features) if has_bias else None
    expected = torch.nn.functional.linear(x, dequantize(weight), bias)
    torch.testing.assert_close(quantized_linear(x, weight, bias), expected)


@given(st.integers(0, 1000), st.sampled_from([None, 0.05]))
def test_inputs_rounded_to_8_bits_are_no_further_than_half_a_step(
    seed: int, scale: float | None
) -> None:
    """Each is the nearest step, zero stays zero, and beyond the last step it is cut off."""
    weight = replace(
        random_weight("int8", 4, 24, 24, seed), activations="int8", activation_scale=scale
    )
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    rounded = round_activations(x, weight)
    step = x.abs().amax(1, keepdim=True) / 127 if scale is None else torch.tensor(scale)
    far = (rounded - x.clamp(-128 * step, 127 * step)).abs()
    assert bool((far <= step * 0.5001).all())
    assert not rounded[1].any()
