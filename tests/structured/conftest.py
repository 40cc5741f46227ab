"""A tiny model with random weights, and its vocabulary."""

from __future__ import annotations

import pytest

from quire import LLM
from quire.structured.vocabulary import Vocabulary

OPTIONS = {"dtype": "float32", "block_size": 4}


@pytest.fixture(scope="session")
def llm(tiny_llama):
    with LLM(tiny_llama, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="session")
def tokenizer(llm):
    return llm.get_tokenizer()


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, 304)
