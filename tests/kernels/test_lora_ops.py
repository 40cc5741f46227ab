"""The operations on LoRA adapters equal their definition, computed row by row in float64."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import Backend
from quire.kernels.lora import Expand, ExpandSlice, LoraRows, Shrink

CPU = torch.device("cpu")
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
owners = st.lists(st.integers(-1, 4), max_size=12)


class Draw:
    """Random tensors and adapters of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def strided(self, *shape: int) -> torch.Tensor:
        """Rows that stand apart, with NaN between them."""
        wide = torch.full((shape[0], shape[1] + 3), torch.nan)
        wide[:, : shape[1]] = self.noise(*shape)
        return wide[:, : shape[1]]

    def shrinks(self, in_features: int, dtype: torch.dtype) -> list[Shrink | None]:
        ranks = [self.rng.choice([None, 0, 1, 3, 8]) for _ in range(5)]
        return [
            None
            if rank is None
            else Shrink(self.noise(rank, in_features).to(dtype), self.noise(rank))
            for rank in ranks
        ]

    def expands(self, out_features: int, width: int, dtype: torch.dtype) -> list[Expand | None]:
        made: list[Expand | None] = []
        for _ in range(5):
            if self.rng.random() < 0.2:
                made.append(None)
                continue
            borders = sorted(self.rng.choices(range(out_features + 1), k=4))
            slices = []
            for first, end in zip(borders[::2], borders[1::2], strict=True):
                start = self.rng.randint(0, width)
                rank = self.rng.randint(0, width - start)
                slices.append(ExpandSlice(first, start, self.noise(end - first, rank).to(dtype)))
            self.rng.shuffle(slices)
            factor, offset = (
                self.noise(out_features) if self.rng.random() < 0.5 else None for _ in range(2)
            )
            made.append(Expand(tuple(slices), factor, offset))
        return made


def rows_of(slots: list[int]) -> LoraRows | None:
    return LoraRows.of(torch.tensor(slots, dtype=torch.int32), CPU)


@given(slots=st.lists(st.integers(-1, 4), max_size=40))
def test_every_row_is_in_the_group_of_its_adapter(slots: list[int]) -> None:
    """Once, in order; groups are in order as well, and there are none without adapters."""
    rows = rows_of(slots)
    found = [-1] * len(slots)
    places = []
    for place, where in () if rows is None else rows.groups:
        numbers = torch.arange(len(slots))[where].tolist()
        assert numbers == sorted(numbers)
        assert numbers
        for number in numbers:
            assert found[number] == -1
            found[number] = place
        places.append(place)
    assert found == slots
    assert places == sorted(set(slots) - {-1})
    assert rows is None or rows.slots.tolist() == slots


@given(seed=st.integers(0, 2**31), slots=owners, dtype=dtypes, in_features=st.integers(1, 40))
def test_lora_shrink(
    backend: Backend, seed: int, slots: list[int], dtype: torch.dtype, in_features: int
) -> None:
    """A row by its own adapter's matrix and scales; zero past its rank and without an adapter."""
    rows = rows_of(slots)
    if rows is None:
        return
    draw = Draw(seed)
    x = draw.strided(len(slots), in_features).to(dtype)
    shrinks = draw.shrinks(in_features, draw.rng.choice([dtype, torch.float32]))
    got = backend.lora_shrink(x, shrinks, rows)
    used = [shrinks[slot] for slot in slots if slot >= 0]
    width = max((len(each.scales) for each in used if each is not None), default=0)
    assert got.shape == (len(slots), width)
    assert got.dtype is torch.float32
    for row, slot in enumerate(slots):
        exact = torch.zeros(width, dtype=torch.float64)
        adapter = shrinks[slot] if slot >= 0 else None
        for rank in range(0 if adapter is None else len(adapter.scales)):
            for column in range(in_features):
                exact[rank] += x[row, column].double() * adapter.a[rank, column].double()
            exact[rank] *= adapter.scales[rank].double()
        assert torch.allclose(got[row].double(), exact, atol=1e-5 * in_features, rtol=0)


@given(seed=st.integers(0, 2**31), slots=owners, dtype=dtypes, out_features=st.integers(1, 12))
def test_lora_expand(
    backend: Backend, seed: int, slots: list[int], dtype: torch.dtype, out_features: int
) -> None:
    """A row gains by its own adapter's slices, then factor and offset; the others keep their bits.

    Rounded once: a result is off by half a unit of its type, and what float32 sums gather.
    """
    rows = rows_of(slots)
    if rows is None:
        return
    draw = Draw(seed)
    width = draw.rng.randint(0, 8)
    before = draw.strided(len(slots), out_features).to(dtype)
    shrunk = draw.noise(len(slots), width)
    expands = draw.expands(out_features, width, draw.rng.choice([dtype, torch.float32]))
    y = before.clone()
    backend.lora_expand(y, shrunk, expands, rows)
    for row, slot in enumerate(slots):
        adapter = expands[slot] if slot >= 0 else None
        if adapter is None:
            assert torch.equal(y[row], before[row])
            continue
        exact = before[row].double()
        for each in adapter.slices:
            for output, weights in enumerate(each.b.double()):
                for rank, weight in enumerate(weights):
                    part = shrunk[row, each.first_rank + rank].double() * weight
                    exact[each.first_row + output] += part
        if adapter.factor is not None:
            exact = exact * adapter.factor.double()
        if adapter.offset is not None:
            exact = exact + adapter.offset.double()
        error = (y[row].double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-5).all()


@pytest.mark.parametrize("slots", [[0, 1, 0], [0, 0, 1], [-1, 0, 1]])
def test_a_nan_stays_in_its_row(backend: Backend, slots: list[int]) -> None:
    """Also among the rows of one adapter."""
    rows = rows_of(slots)
    assert rows is not None
    draw = Draw(0)
    shrinks = [Shrink(draw.noise(4, 6), torch.ones(4)) for _ in range(2)]
    expands = [Expand((ExpandSlice(0, 0, draw.noise(5, 4)),)) for _ in range(2)]
    x, y = draw.noise(3, 6), draw.noise(3, 5)
    expected = y.clone()
    backend.lora_expand(expected, backend.lora_shrink(x, shrinks, rows), expands, rows)
    x[1] = torch.nan
    backend.lora_expand(y, backend.lora_shrink(x, shrinks, rows), expands, rows)
    assert torch.isnan(y[1]).all()
    assert torch.equal(y[::2], expected[::2])
