"""Service: what the endpoints share, the engine foremost."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request

from quire.errors import AdapterError, EngineBusyError, InvalidRequestError
from quire.server.adapters import OpenModel, ServedAdapters, ServedModel
from quire.server.errors import ApiError
from quire.server.life import Life
from quire.server.metrics import Metrics
from quire.server.record import RECORD
from quire.utils.checks import shown

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM
    from quire.chat import ChatFormat
    from quire.engine.processor import ModelLimits
    from quire.outputs import RequestOutput
    from quire.prompts import Prompt
    from quire.sampling_params import SamplingParams
    from quire.server.settings import ServerSettings
    from quire.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("quire")

_MOST_TOLD: Final = 20
"""Names of models in an error."""


class Service:
    """The engine and the settings of one server.

    Parameters
    ----------
    llm : AsyncLLM
        Closed by whoever made it.
    settings : ServerSettings
    tokenizer : Tokenizer
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, tokenizer: Tokenizer) -> None:
        self.llm = llm
        self.settings = settings
        self.tokenizer = tokenizer
        self.created = int(time.time())
        self.life = Life()
        self.adapters = ServedAdapters(llm, settings)
        self.metrics = Metrics(
            settings.served_model_names[0],
            settings.metrics_prefix,
            llm.config,
            llm.limits.max_model_len,
        )

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the model's answers in a chat are read."""
        from quire.chat import ChatFormat

        template = self.settings.chat_template or self.llm.config.model.chat_template
        return ChatFormat.for_model(
            template or self.tokenizer,
            tool_parser=self.settings.tool_call_parser,
            reasoning_parser=self.settings.reasoning_parser,
        )

    @property
    def limits(self) -> ModelLimits:
        """What a request is measured against."""
        return self.llm.limits

    @property
    def model_name(self) -> str:
        """The name that stands in answers."""
        return self.settings.served_model_names[0]

    async def find_model(self, name: str | None) -> ServedModel:
        """Return the model, or the adapter, of a name; None asks for the model.

        Raises
        ------
        ApiError
            404: nothing here is called so.
        """
        if name is None:
            return ServedModel(self.model_name)
        if name in self.settings.served_model_names:
            return ServedModel(name)
        if await self.adapters.has(name):
            return ServedModel(name, is_adapter=True)
        raise await self._no_model(name)

    async def open_model(self, name: str | None) -> OpenModel:
        """Return what :meth:`find_model` returns, as it is now, for the requests of one answer."""
        model = await self.find_model(name)
        if not model.is_adapter:
            return OpenModel(model.name)
        try:
            return OpenModel(model.name, await self.llm.find_lora(model.name))
        except AdapterError as error:
            if not await self.adapters.has(model.name):  # since it was found
                raise await self._no_model(model.name) from None
            logger.error("%s", error)
            raise ApiError(
                500,
                f"the adapter {model.name!r} cannot be read again; the server's log has the reason",
                param="model",
            ) from None

    async def _no_model(self, name: str) -> ApiError:
        served = [*self.settings.served_model_names]
        served += [card.name for card in await self.adapters.cards()]
        more = f" and {len(served) - _MOST_TOLD} more" if len(served) > _MOST_TOLD else ""
        return ApiError(
            404,
            f"the model {shown(name)} is not served here: this server has "
            f"{', '.join(served[:_MOST_TOLD])}{more}",
            param="model",
            code="model_not_found",
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one prompt; every endpoint's requests go through here.

        Closing the generator, or cancelling the task that reads it, ends the request.
        """
        record = RECORD.get()
        if self.settings.log_prompts:
            http_id = "-" if record is None else record.request_id
            logger.info("request %s: prompt %r, %r", http_id, prompt, params)
        watch = self.metrics.watch(params, record)
        stream = self.llm.generate(prompt, params, request_id, priority=priority, **options)
        ended = False
        try:
            async with aclosing(stream):
                async for output in stream:
                    watch.show(output)
                    ended = output.finished
                    yield output
        except (InvalidRequestError, EngineBusyError):  # it has never begun
            ended = True
            raise
        except Exception:
            watch.fail("error")
            ended = True
            raise
        finally:
            if not ended:
                watch.fail("abort")


def get_service(request: Request) -> Service:
    """Return the service of the application that a request came to, for ``Depends``."""
    service: Service = request.app.state.service
    return service
