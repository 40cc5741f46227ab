from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quire.integrations.vllm as stand_in


@pytest.fixture
def served() -> Iterator[None]:
    """``import vllm`` is served by quire while a test runs."""
    stand_in.install()
    try:
        yield
    finally:
        stand_in.uninstall()
        assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[Any]:
    from quire.integrations.vllm.llm import LLM

    model = LLM(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=200)
    yield model
    model.quire.close()
