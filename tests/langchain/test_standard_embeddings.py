"""LangChain's own standard tests of embeddings, with the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from quire.integrations.langchain.embeddings import VLLMEmbeddings


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[VLLMEmbeddings]:
    """Hold the engine that all objects of these tests share."""
    with VLLMEmbeddings(model="quire/demo") as embeddings:
        yield embeddings


class Standard:
    """What both suites are told; nothing is switched off."""

    @property
    def embeddings_class(self) -> type[VLLMEmbeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "quire/demo"}


class TestUnit(Standard, EmbeddingsUnitTests):
    """The suite that runs no model."""


class TestIntegration(Standard, EmbeddingsIntegrationTests):
    """The suite that runs the model."""
