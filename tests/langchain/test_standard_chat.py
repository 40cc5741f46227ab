"""LangChain's own standard tests of chat models, with the demo model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from quire.integrations.langchain.chat_vllm import ChatVLLM

# The third version of events is a beta, and its users are told.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[ChatVLLM]:
    """Hold the engine that all models of these tests share."""
    with ChatVLLM(model="quire/demo") as chat:
        yield chat


class Snapshot:
    """Equal to the serialized form of a model, whatever the versions that it names."""

    def __call__(self, name: str) -> Snapshot:
        return self

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, dict)
        kwargs = other["kwargs"]
        given = {"model": "quire/demo", "temperature": 0.0, "max_new_tokens": 100, "stop": []}
        assert {k: kwargs[k] for k in given} == given
        assert kwargs.keys() <= {*ChatVLLM.model_fields} - {"client", "profile", "callbacks"}
        assert other["id"] == ["quire", "integrations", "langchain", "chat_vllm", "ChatVLLM"]
        assert (other["lc"], other["type"]) == (1, "constructor")
        return True

    __hash__ = None  # type: ignore[assignment]


class Standard:
    """What both suites are told of ChatVLLM.

    Switched off, by what their properties are by default: images, their URLs, PDF, audio and
    video, in messages and in answers of tools (``supports_image_inputs`` and the like), because
    the engine runs models of text alone, and Anthropic's inputs (``supports_anthropic_inputs``),
    which are of images, too; recorded HTTP (``enable_vcr_tests``), because there is no HTTP.
    """

    @property
    def chat_model_class(self) -> type[ChatVLLM]:
        return ChatVLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # The demo model repeats itself without end in texts of a kind that it has not learned.
        return {"model": "quire/demo", "temperature": 0, "frequency_penalty": 1.0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # an engine in this process has one model


class TestUnit(Standard, ChatModelUnitTests):
    """The suite that runs no model."""

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # There is no server that would want a key, time out or be asked again.
        params = super().standard_chat_model_params
        return {k: v for k, v in params.items() if k not in ("api_key", "timeout", "max_retries")}

    @pytest.fixture(autouse=True)
    def trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trust the class, as a user must: LangChain's "all" are the classes that it knows."""
        loader: Any = importlib.import_module("langchain_core.load.load")
        path = ("quire", "integrations", "langchain", "chat_vllm", "ChatVLLM")
        monkeypatch.setitem(loader._default_class_paths_cache, "all", {path})

    @pytest.fixture
    def snapshot(self) -> Snapshot:
        return Snapshot()

    @pytest.fixture
    def benchmark(self) -> Callable[[Callable[[], Any]], Any]:
        return lambda function: function()  # the plugin of that name is switched off


class TestIntegration(Standard, ChatModelIntegrationTests):
    """The suite that runs the model."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None

    @pytest.fixture
    def vcr(self) -> None:
        return None
