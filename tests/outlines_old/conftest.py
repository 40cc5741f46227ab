"""The demo model, as Outlines' 0.x API takes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from quire import LLM
from quire.integrations.outlines.models import VLLM


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM("quire/demo", max_model_len=256) as llm:
        yield llm


@pytest.fixture(scope="session")
def model(llm: LLM) -> Any:
    return VLLM(llm)


@pytest.fixture
def models_module(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let the adapter's models be on the one engine."""
    module = ModuleType("quire.integrations.outlines.models")
    module.VLLM = VLLM
    module.vllm = lambda name, **kwargs: VLLM(llm)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
