"""Tensors here are tiny: a second thread would only wait for the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import cpu_backends

from quire.kernels import Backend, get_backend


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=cpu_backends())
def kernels(request: pytest.FixtureRequest) -> Backend:
    """Every backend that is installed and works on this machine's CPU."""
    return get_backend("cpu", request.param)
