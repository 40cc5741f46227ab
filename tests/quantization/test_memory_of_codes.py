"""Codes are in memory once: in the order that steps read."""

from __future__ import annotations

import weakref

import pytest
import torch

from quire import LLM
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.packed_codes import PackedCodes
from quire.kernels.quantized import QuantizedWeight


def test_packed_codes_hold_nothing_of_what_they_were_packed_from(native_library):
    """Not even a view of no rows, which would keep the memory of all."""
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8).numpy()
    scales = torch.rand(32, 2).numpy()
    watched = [weakref.ref(codes), weakref.ref(scales)]
    weight = QuantizedWeight("int8", torch.from_numpy(codes), torch.from_numpy(scales), 64, 32)
    packed = PackedCodes(native_library, weight)
    del codes, scales, weight
    assert [each() for each in watched] == [None, None]
    assert packed.read().codes.shape == (32, 64)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_natively_run_model_never_unpacks_its_codes(
    native_library, tiny_llama, monkeypatch, quantization
):
    """Neither while it is loaded nor in a step."""

    def unpack(self: PackedCodes) -> QuantizedWeight:
        raise AssertionError("unpacked")

    monkeypatch.setattr(PackedCodes, "read", unpack)
    with LLM(
        tiny_llama, dtype="float32", quantization=quantization, skip_tokenizer_init=True
    ) as llm:
        assert llm.llm_engine._runner.model.native is not None
        llm.generate([[5, 6, 7]], use_tqdm=False)


@pytest.fixture
def native_library():
    """The library, where it is built."""
    from quire.kernels.cpu.backend import why_missing

    if (reason := why_missing()) is not None:
        pytest.skip(reason)
    return load_library()
