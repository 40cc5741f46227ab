"""Chat models in whose cache an answer is never taken for another adapter's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult

from quire.integrations.adapters import as_wanted

if TYPE_CHECKING:
    from quire.integrations.adapters import Wanted
    from quire.request_maker import FoundAdapter


class AdapterChat(BaseChatModel):
    """A chat model that looks for the adapter of a call once, for the cache and for the engine.

    Another base has the field ``lora_request`` and finds what it names (``_found``).
    """

    if TYPE_CHECKING:
        lora_request: Any

        def _found(self, wanted: Wanted) -> FoundAdapter: ...

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
