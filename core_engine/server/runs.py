"""Run: the prompts of one HTTP request, in the engine together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from quire.errors import InvalidRequestError, RequestFailedError
from quire.outputs import RequestOutput
from quire.server.errors import ApiError
from quire.server.response_format import structure_field
from quire.server.sampling import field_error

if TYPE_CHECKING:
    from quire.prompts import TokensPrompt
    from quire.sampling_params import SamplingParams
    from quire.server.adapters import OpenModel
    from quire.server.protocol.embeddings import EmbeddingRequest
    from quire.server.protocol.sampling import SamplingBody
    from quire.server.service import Service

Numbered = tuple[int, RequestOutput]
"""Which prompt, and what came of it."""


class Run:
    """The prompts of one HTTP request.

    Parameters
    ----------
    service : Service
    body : SamplingBody
    prompts : list of TokensPrompt
        Tokenized: what takes long has been done elsewhere than in the event loop.
    params : SamplingParams
        Of all of them.
    model : OpenModel
        What they are for.
    prompt_field : str
        Where the prompts stand in the body.
    kind : str
        What the answer's id begins with.

    Attributes
    ----------
    id : str
        Of the answer.
    """

    def __init__(
        self,
        service: Service,
        body: SamplingBody,
        prompts: Sequence[TokensPrompt],
        params: SamplingParams,
        *,
        model: OpenModel,
        prompt_field: str,
        kind: str,
    ) -> None:
        self.prompts = prompts
        self.params = params
        self.id = f"{kind}-{body.request_id or uuid4().hex}"
        self._service = service
        self._body = body
        self._model = model
        self._prompt_field = prompt_field

    async def outputs(self) -> AsyncGenerator[Numbered, None]:
        """Yield every prompt's outputs as they come; closing it ends all of them.

        Raises
        ------
        ApiError, QuireError
            One of the prompts failed; the others have been ended.
        """
        if len(self.prompts) == 1:
            async with aclosing(self._one(0)) as outputs:
                async for output in outputs:
                    yield 0, output
            return
        queue: asyncio.Queue[Numbered | Exception] = asyncio.Queue(2 * len(self.prompts))
        # One request of many prompts must not be what keeps others, or its own last ones, out.
        room = asyncio.Semaphore(self._service.llm.config.scheduler.max_num_seqs)
        tasks = [
            asyncio.ensure_future(self._pump(i, queue, room)) for i in range(len(self.prompts))
        ]
        pending = len(tasks)
        try:
            while pending:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                pending -= item[1].finished
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def all(self) -> list[RequestOutput]:
        """Return the last output of each prompt, in order."""
        found: dict[int, RequestOutput] = {}
        async with aclosing(self.outputs()) as outputs:
            async for i, output in outputs:
                found[i] = output
        return [found[i] for i in range(len(self.prompts))]

    async def _pump(
        self, i: int, queue: asyncio.Queue[Numbered | Exception], room: asyncio.Semaphore
    ) -> None:
        try:
            async with room, aclosing(self._one(i)) as outputs:
                async for output in outputs:
                    await queue.put((i, output))
        except Exception as error:
            await queue.put(error)

    async def _one(self, i: int) -> AsyncGenerator[RequestOutput, None]:
        name = self.id if len(self.prompts) == 1 else f"{self.id}-{i}"
        outputs = self._service.generate(
            self.prompts[i],
            self.params,
            lora_request=self._model.adapter,
            request_id=name,
            priority=self._body.priority or 0,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if output.finished:
                        _check_whole(output)
                    yield output
        except InvalidRequestError as error:
            raise self._wrong(i, error, self._prompt_field) from None
        except RequestFailedError as error:
            cause = error.__cause__
            if not isinstance(cause, InvalidRequestError):
                raise
            # What a text has to match is read after the request was taken in.
            raise self._wrong(i, cause, structure_field(self._body)) from None

    def _wrong(self, i: int, error: InvalidRequestError, field: str) -> ApiError:
        failed = field_error(error, self._body, field)
        if len(self.prompts) > 1:
            failed.message = f"prompt {i} of {len(self.prompts)}: {failed.message}"
        return failed


def _check_whole(output: RequestOutput) -> None:
    """Refuse an output that somebody else than the client cut off."""
    for completion in output.outputs:
        if completion.finish_reason == "abort":
            raise ApiError(503, "the request was aborted by the server", code="aborted")


async def tokenized(
    service: Service,
    prompts: Sequence[str | list[int]],
    body: SamplingBody | EmbeddingRequest,
) -> list[TokensPrompt]:
    """Return prompts with their token ids; long texts are read outside of the event loop.

    Raises
    ------
    ApiError
        400: a text has no tokens.
    """
    add_special = body.add_special_tokens is not False
    size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))

    def work() -> list[TokensPrompt]:
        return [_tokens(service, prompt, add_special, body.cache_salt) for prompt in prompts]

    return await asyncio.to_thread(work) if size > _SHORT else work()


_SHORT = 4096
"""Characters that are tokenized faster than a thread is asked to."""


def _tokens(
    service: Service, prompt: str | list[int], add_special: bool, salt: str | None
) -> TokensPrompt:
    made: dict[str, Any]
    if isinstance(prompt, str):
        ids = service.tokenizer.encode_prompt(prompt, add_special)
        made = {"prompt": prompt, "prompt_token_ids": ids}
    else:
        made = {"prompt_token_ids": prompt}
    if salt is not None:
        made["cache_salt"] = salt
    return made  # type: ignore[return-value]
