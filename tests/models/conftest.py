from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels import get_backend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.loader import load_model


@pytest.fixture(scope="session")
def load() -> Callable[..., Decoder]:
    """``load(folder, overrides=None, dtype=float32, backend=None, **options)``."""

    def load(
        folder: Path,
        overrides: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        **options: Any,
    ) -> Decoder:
        return load_model(
            folder,
            read_config(folder, overrides),
            device=torch.device("cpu"),
            dtype=dtype,
            kernels=get_backend("cpu", backend),
            **options,
        )

    return load


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with two threads, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
