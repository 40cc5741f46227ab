"""The backends under test: each must do what `quire.kernels.interface.Backend` says."""

from __future__ import annotations

import pytest
import torch
from backends import cpu_backends

from quire.kernels import Backend, get_backend


@pytest.fixture(scope="session", params=cpu_backends())
def backend(request) -> Backend:
    """Every backend that is installed and works on this machine's CPU."""
    found = get_backend("cpu", request.param)
    assert found.name == request.param
    return found


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
