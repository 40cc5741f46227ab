"""LangChain models that run on quire's own engine, in this process.

``VLLM`` is a drop-in for the class of that name in ``langchain_community.llms``. Nothing heavy is
imported before a model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.integrations.langchain.vllm import VLLM

__all__ = ["VLLM"]


def __getattr__(name: str) -> Any:
    if name == "VLLM":
        try:
            import langchain_core  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "langchain_core":
                raise
            raise ImportError(
                "quire.integrations.langchain needs langchain-core: pip install 'quire[langchain]'"
            ) from error
        from quire.integrations.langchain.vllm import VLLM

        globals()[name] = VLLM  # the next access does not come here
        return VLLM
    message = f"module {__name__!r} has no {name!r}; it has {', '.join(__all__)}"
    if name[:1].isupper():
        # `from ... import Name` would replace the text of an AttributeError by its own.
        raise ImportError(message, name=__name__)
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
