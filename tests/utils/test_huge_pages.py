"""Huge pages are a matter of speed alone: the tensors, and what they take, stay the same."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from quire.utils.huge_pages import allocate

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (1 << 20,), (1000, 2100), (7, 600, 700)])
def test_tensors_are_as_torch_makes_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape, type, strides and all of the memory, which can be written to."""
    tensor = allocate(shape, dtype)
    plain = torch.empty(shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == (shape, dtype, plain.stride())
    values = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    tensor.copy_(values)
    assert torch.equal(tensor, values)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_memory_is_taken_than_is_used() -> None:
    """The end of a tensor, less than a huge page, is no huge page."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    tensors = [allocate((int(3.1 * MIB),), torch.uint8).fill_(1) for _ in range(20)]
    taken = resident() - before
    assert taken < sum(tensor.nbytes for tensor in tensors) + 4 * MIB
