"""The demo model in codes: its logits are those of what the codes stand for."""

from __future__ import annotations

import pytest
from coded_decoders import BACKENDS, assert_close, load_decoder, plain_twin, prefill

from quire.demo import model_path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "nf4"])
def test_logits_are_those_of_the_dequantized_weights(method: str, backend: str) -> None:
    """To a thousandth of the largest, although native products round inputs to 16 bits."""
    decoder = load_decoder(model_path(), backend, method)
    twin = plain_twin(decoder, model_path())
    assert_close(prefill(decoder), prefill(twin), 1e-3)
