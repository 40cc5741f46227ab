"""Products with adapters: what rows gain, and that nothing else about a batch matters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isas import rounds_activations

from quire.kernels import available_backends
from quire.kernels.cpu.packed_linear import PackedLinear
from quire.models.adapter import DeltaSlice, LinearDelta

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_slices(rng: random.Random, out_features: int) -> list[tuple[int, int]]:
    """Some rows, in up to three stretches that need not touch: whole blocks, or any."""
    unit = rng.choice([1, 16])
    places = range(0, out_features + unit, unit)
    borders = sorted(min(rng.choice(places), out_features) for _ in range(2 * rng.randint(0, 3)))
    return [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]


def draw_delta(
    rng: random.Random, in_features: int, out_features: int, dtype: torch.dtype
) -> LinearDelta:
    generator = torch.Generator().manual_seed(rng.randrange(2**32))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    slices, total = [], 0
    for first, end in draw_slices(rng, out_features):
        rank = rng.choice([1, 2, 3, 8, 16, 17, 64, 70])
        slices.append(DeltaSlice(first, total, normal(end - first, rank).to(dtype)))
        total += rank
    return LinearDelta(
        a=(normal(total, in_features) / in_features**0.5).to(dtype),
        scales=normal(total),
        slices=tuple(slices),
        bias=normal(out_features) if rng.random() < 0.3 else None,
        factor=1 + 0.3 * normal(out_features) if rng.random() < 0.3 else None,
    )


def plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, delta: LinearDelta
) -> torch.Tensor:
    """What a delta makes of rows, as its docstring says, in float64."""
    y = x.double() @ weight.double().T
    shrunk = delta.scales.double() * (x.double() @ delta.a.double().T)
    for each in delta.slices:
        size, rank = each.b.shape
        ranks = shrunk[:, each.first_rank : each.first_rank + rank]
        y[:, each.first_row : each.first_row + size] += ranks @ each.b.double().T
    if delta.factor is not None:
        y *= delta.factor.double()
    for addend in (bias, delta.bias):
        if addend is not None:
            y += addend.double()
    return y


def sizes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, delta: LinearDelta
) -> torch.Tensor:
    """The sum of the sizes of all that is added up for a number."""
    slices = tuple(DeltaSlice(s.first_row, s.first_rank, s.b.abs()) for s in delta.slices)
    made_positive = LinearDelta(
        delta.a.abs(),
        delta.scales.abs(),
        slices,
        None if delta.bias is None else delta.bias.abs(),
        None if delta.factor is None else delta.factor.abs(),
    )
    return plain(x.abs(), weight.abs(), None if bias is None else bias.abs(), made_positive)


@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    adapter_dtype=st.sampled_from(sorted(DTYPES)),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_row_gets_what_its_own_adapter_adds(
    isa: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: str,
    adapter_dtype: str,
    num_threads: int,
    seed: int,
) -> None:
    """To the rounding of float32; and the same bits alone, in any company, on any threads.

    The gain is computed from inputs that no instruction set rounds. Rows without an adapter have
    the bits that they have in a model that knows of none. What lies behind the last row in memory
    is not looked at.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bfloat16":
        in_features += in_features % 2
    x = torch.full((rows + 1, in_features), torch.nan)[:rows]
    x.normal_(generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator).to(DTYPES[dtype])
    bias = torch.randn(out_features, generator=generator) if rng.random() < 0.5 else None
    deltas = [
        draw_delta(rng, in_features, out_features, DTYPES[adapter_dtype])
        for _ in range(rng.randint(1, 4))
    ]
    slots = torch.tensor([rng.randint(-1, len(deltas) - 1) for _ in range(rows)], dtype=torch.int32)
    if rng.random() < 0.5:
        slots = slots.sort().values  # neighbours have one adapter
    linear = PackedLinear(weight, bias, deltas)
    with threads(num_threads):
        result = linear(x, slots)
    unit = 2.0**-8 if dtype == "bfloat16" and rounds_activations(isa) else 0.0
    for row in range(rows):
        slot = int(slots[row])
        one = slice(row, row + 1)
        with threads(1):
            assert torch.equal(linear(x[one], slots[one])[0], result[row])
        if slot < 0:
            continue
        delta = deltas[slot]
        exact = plain(x[one], weight, bias, delta)[0]
        most = sizes(x[one], weight, bias, delta)[0]
        bound = (unit + (in_features + len(delta.scales) + 8) * 2.0**-24) * most
        assert ((result[row] - exact).abs() <= bound + 1e-30).all()
    nobody = slots < 0
    assert torch.equal(result[nobody], PackedLinear(weight, bias)(x)[nobody])
    some = torch.randperm(rows, generator=generator)[: rng.randint(1, rows)]
    with threads(2):
        assert torch.equal(linear(x[some].contiguous(), slots[some].contiguous()), result[some])


@pytest.mark.parametrize("rank", [1, 3, 16, 17])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_none_stay_in_their_row(isa: str, dtype: str, rank: int) -> None:
    """NaN and infinity in one row reach no other, also not by ranks that a pair lacks."""
    rng = random.Random(rank)
    x, weight = torch.randn(9, 32), torch.randn(40, 32).to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    delta = LinearDelta(
        torch.randn(rank, 32, generator=generator).to(DTYPES[dtype]),
        torch.ones(rank),
        (DeltaSlice(0, 0, torch.randn(40, rank, generator=generator).to(DTYPES[dtype])),),
    )
    slots = torch.tensor([rng.randint(-1, 1) for _ in range(9)], dtype=torch.int32)
    slots[4] = 0
    linear = PackedLinear(weight, None, [delta, delta])
    expected = linear(x, slots)
    x[4, 5], x[4, 6] = torch.inf, torch.nan
    broken = linear(x, slots)
    assert torch.isnan(broken[4]).all()
    rest = [row for row in range(9) if row != 4]
    assert torch.equal(broken[rest], expected[rest])
