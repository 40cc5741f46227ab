"""The demo model, and the smallest thing that Outlines' 0.x API takes for a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from quire import LLM


class Model:
    """What the generators ask of a model, and no more."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm


def make_model(llm: LLM) -> Any:
    return Model(llm)


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM("quire/demo", max_model_len=256) as llm:
        yield llm


@pytest.fixture(scope="session")
def model(llm: LLM) -> Any:
    return make_model(llm)


@pytest.fixture
def models_module(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put :class:`Model` in place of the adapter's models."""
    module = ModuleType("quire.integrations.outlines.models")
    module.VLLM = Model
    module.vllm = lambda name, **kwargs: Model(llm)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
