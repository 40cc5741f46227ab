"""LangChain models on quire: on its own engine in this process, and on a server.

``VLLM`` and ``VLLMOpenAI`` are drop-ins for the classes of these names in
``langchain_community.llms``. Nothing heavy is imported before a model is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.integrations.langchain.chat_vllm import ChatVLLM
    from quire.integrations.langchain.embeddings import VLLMEmbeddings
    from quire.integrations.langchain.vllm import VLLM
    from quire.integrations.langchain.vllm_openai import VLLMOpenAI

_HOMES = {
    "VLLM": "quire.integrations.langchain.vllm",
    "VLLMOpenAI": "quire.integrations.langchain.vllm_openai",
    "ChatVLLM": "quire.integrations.langchain.chat_vllm",
    "VLLMEmbeddings": "quire.integrations.langchain.embeddings",
}

__all__ = ["VLLM", "ChatVLLM", "VLLMEmbeddings", "VLLMOpenAI"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        try:
            import langchain_core  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "langchain_core":
                raise
            raise ImportError(
                "quire.integrations.langchain needs langchain-core: pip install 'quire[langchain]'"
            ) from error
        value = getattr(import_module(home), name)
        globals()[name] = value  # the next access does not come here
        return value
    message = f"module {__name__!r} has no {name!r}; it has {', '.join(__all__)}"
    if name[:1].isupper():
        # `from ... import Name` would replace the text of an AttributeError by its own.
        raise ImportError(message, name=__name__)
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
