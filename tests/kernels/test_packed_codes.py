"""PackedCodes: what was brought into blocks can be read again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from coded_weights import Draw, coded_weights
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import available_backends, get_backend
from quire.kernels.cpu.packed_codes import PackedCodes, unit_of
from quire.kernels.quantized import QuantizedWeight

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    tensors, others = a.tensors(), b.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    for field in dataclasses.fields(a):
        if field.name not in tensors:
            assert getattr(a, field.name) == getattr(b, field.name), field.name


@given(draw=coded_weights(), seed=st.integers(0, 2**16))
def test_a_packed_weight_is_read_bit_for_bit(draw: Draw, seed: int) -> None:
    """As a whole, and any of its outputs in any order."""
    weight = draw.weight()
    packed = PackedCodes(get_backend("cpu", "cpu").library, weight)
    assert_same(packed.read(), weight)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, draw.out_features, (9,), generator=generator)
    assert_same(packed.rows(ids), weight.select(ids))
    assert_same(packed.rows(ids[:0]), weight.select(ids[:0]))


@given(draw=coded_weights())
def test_a_unit_is_a_part_of_a_group(draw: Draw) -> None:
    """Of whole steps of the kernels, and small enough for sums of 32 bits."""
    weight = draw.weight()
    unit = unit_of(weight)
    assert unit % 8 == 0
    assert 0 < unit <= 128
    if weight.scales.shape[1] > 1:
        assert weight.group_size % unit == 0


def test_blocks_take_little_more_than_the_codes() -> None:
    """Memory is what a step reads; of 4 bits by groups of 128, 4.25 bits a weight."""
    weight = Draw("int4", 1024, 160, 128, False, False, False, "float", None, 0).weight()
    packed = PackedCodes(get_backend("cpu", "cpu").library, weight)
    assert packed.num_bytes <= 1024 * 160 * 4.25 / 8 + 64
    assert (packed.out_features, packed.in_features) == (160, 1024)


def test_groups_that_the_kernels_cannot_sum_up_are_refused() -> None:
    """A group of 20 columns has no part of a multiple of 8."""
    weight = Draw("int8", 60, 16, 20, False, False, False, "float", None, 0).weight()
    with pytest.raises(ValueError, match=r"groups of 20 columns.*multiples of 8"):
        PackedCodes(get_backend("cpu", "cpu").library, weight)


def test_memory_may_come_from_elsewhere() -> None:
    """Such as huge pages; it is asked for once."""
    sizes = []

    def allocate(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    weight = Draw("int4", 100, 30, 32, True, False, False, "float", None, 0).weight()
    packed = PackedCodes(get_backend("cpu", "cpu").library, weight, allocate)
    assert_same(packed.read(), weight)
    assert len(sizes) == 1
