"""What native products with integer codes are off: their inputs, rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from coded_decoders import BACKENDS, SENSITIVE, assert_close, load_decoder, prefill

from quire.kernels.cpu.packed_codes import unit_of
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.backend import ReferenceBackend
from quire.kernels.reference.quantized import quantized_linear

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="the native kernels were not built: no compiler"
)


def rounded_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product with inputs in whole steps of 2^-15 of the largest of their unit."""
    assert weight.order is None
    assert weight.input_factors is None
    unit = unit_of(weight)
    units = F.pad(x, (0, -x.shape[1] % unit)).unflatten(1, (-1, unit))
    steps = units.abs().amax(2, keepdim=True) / 32767
    rounded = torch.where(steps > 0, (units / steps).round() * steps, 0).flatten(1)
    return quantized_linear(rounded[:, : x.shape[1]], weight, bias)


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", *SENSITIVE])
def test_natives_are_off_by_the_rounding_of_inputs(
    name: str,
    method: str,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a model multiplies that to more than a thousandth of its largest logit."""
    found = prefill(load_decoder(tiny_checkpoint(name), "cpu", method))
    monkeypatch.setattr(ReferenceBackend, "quantized_linear", staticmethod(rounded_linear))
    assert_close(found, prefill(load_decoder(tiny_checkpoint(name), "reference", method)), 1e-3)
