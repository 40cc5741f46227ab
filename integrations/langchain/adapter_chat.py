"""Chat models in whose cache an answer is never taken for another adapter's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig

from quire.integrations.adapters import as_wanted

if TYPE_CHECKING:
    from typing_extensions import Self

    from quire.integrations.adapters import Wanted
    from quire.request_maker import FoundAdapter


class AdapterChat(BaseChatModel):
    """A chat model that looks for the adapter of a call once, for the cache and for the engine.

    Another base has the field ``lora_request``, finds what it names (``_found``), and makes a copy
    for one call that keeps it (``_holding``).
    """

    if TYPE_CHECKING:
        lora_request: Any

        def _found(self, wanted: Wanted) -> FoundAdapter: ...

        def _holding(self, adapter: FoundAdapter | None) -> Self: ...

    async def _aholding(self, kwargs: dict[str, Any]) -> Self:
        """Return a model for one call whose adapter was read beside the event loop.

        LangChain looks at a model's parameters, and with that at the adapter, as a call begins.
        """
        wanted = as_wanted(kwargs.pop("lora_request", self.lora_request))
        return self._holding(
            None if wanted is None else await asyncio.to_thread(self._found, wanted)
        )

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer conversations together with all else that runs; see LangChain's."""
        model = await self._aholding(kwargs)
        return await super(AdapterChat, model).agenerate(messages, stop, callbacks, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Yield an answer as it comes; see LangChain's."""
        model = await self._aholding(kwargs)
        running = super(AdapterChat, model).astream(input, config, stop=stop, **kwargs)
        async with aclosing(running) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        wanted = as_wanted(kwargs.get("lora_request", self.lora_request))
        if wanted is not None:
            kwargs["lora_request"] = self._found(wanted)
        return super()._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        wanted = as_wanted(kwargs.get("lora_request", self.lora_request))
        if wanted is not None:
            kwargs["lora_request"] = await asyncio.to_thread(self._found, wanted)
        return await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs)
