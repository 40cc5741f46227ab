"""A tiny model with random weights, which says anything that it is allowed to."""

from __future__ import annotations

import pytest

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

from quire import LLM
from quire.integrations.outlines import models

OPTIONS = {"dtype": "float32", "block_size": 4}


@pytest.fixture(scope="session")
def llm(tiny_llama):
    with LLM(tiny_llama, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="session")
def model(llm):
    return models.VLLM(llm)
