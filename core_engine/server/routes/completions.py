"""``/v1/completions``: going on with texts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from quire import __version__
from quire.engine.processor import MAX_SEQUENCES
from quire.server.body import JsonRoute
from quire.server.disconnect import until_disconnect
from quire.server.errors import ApiError
from quire.server.fields import accept_fields
from quire.server.logprobs import CompletionLogprobs, joined, prompt_logprobs
from quire.server.protocol.completions import CompletionRequest
from quire.server.protocol.error import ERRORS
from quire.server.runs import Run, tokenized
from quire.server.sampling import check_stream_fields, sampling_params
from quire.server.service import Service, get_service
from quire.server.sse import DONE, event, json_response, stream_response
from quire.server.usage import Usage

if TYPE_CHECKING:
    from quire.outputs import CompletionOutput, RequestOutput

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", responses=ERRORS)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Go on with a text, or several."""
    accept_fields(request, body, service)
    model = await service.open_model(body.model)
    check_stream_fields(body)
    asked = _asked_prompt_logprobs(body)
    no_tokens = body.max_tokens == 0
    if no_tokens and not body.echo and asked is None:
        raise ApiError(400, "max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    overrides: dict[str, Any] = {"logprobs": body.logprobs, "prompt_logprobs": asked}
    if no_tokens:  # the engine generates at least one, which is dropped
        overrides.update(max_tokens=1, min_tokens=0)
    defaults = await service.llm.get_default_sampling_params()
    params = sampling_params(service, body, defaults, **overrides)
    if len(body.prompt) * params.n > MAX_SEQUENCES:
        raise ApiError(
            400,
            f"prompt, times n, must be at most {MAX_SEQUENCES} completions, got "
            f"{len(body.prompt)} times {params.n}",
            param="prompt",
        )
    prompts = await tokenized(service, body.prompt, body)
    run = Run(service, body, prompts, params, model=model, prompt_field="prompt", kind="cmpl")
    answer = _Answer(service, body, run, model.name)
    if body.stream:
        return await stream_response(request, answer.events())
    outputs = await until_disconnect(request.receive, run.all())
    return json_response(answer.whole(outputs))


def _asked_prompt_logprobs(body: CompletionRequest) -> int | None:
    """Return how many log-probabilities per token of the prompt some field asks for."""
    if not body.echo or body.logprobs is None:
        return body.prompt_logprobs
    counts = (body.logprobs, -2 if body.prompt_logprobs is None else body.prompt_logprobs)
    return -1 if -1 in counts else max(counts)


class _Answer:
    """The answer to a request, whole or in events."""

    def __init__(self, service: Service, body: CompletionRequest, run: Run, model: str) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._run = run
        self._n = run.params.n
        self._usage = Usage()
        self._head = {
            "id": run.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"quire-{__version__}",
        }
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = []
        for i, output in enumerate(outputs):
            self._usage_of(i, output)
            choices += [self._choice(i, output, completion, True) for completion in output.outputs]
        return {**self._head, "choices": choices, "usage": self._usage.shape()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it comes."""
        options = self._body.stream_options
        usage_at_end = options is not None and bool(options.include_usage)
        usage_always = options is not None and bool(options.continuous_usage_stats)
        begun: set[int] = set()
        async with aclosing(self._run.outputs()) as outputs:
            async for i, output in outputs:
                self._usage_of(i, output)
                parts = []
                for completion in output.outputs:
                    index = i * self._n + completion.index
                    first = index not in begun
                    if first:
                        begun.add(index)
                    choice = self._choice(i, output, completion, first)
                    if _says_something(choice):
                        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
                        if usage_always:
                            chunk["usage"] = self._usage.shape()
                        elif usage_at_end:
                            chunk["usage"] = None
                        parts.append(event(chunk))
                if parts:
                    yield b"".join(parts)
        if usage_at_end:
            yield event({**self._head, "choices": [], "usage": self._usage.shape()})
        yield DONE

    def _usage_of(self, i: int, output: RequestOutput) -> None:
        if self._body.max_tokens == 0:
            for completion in output.outputs:
                _drop_token(completion)
        self._usage.add(i, output)

    def _choice(
        self, i: int, output: RequestOutput, completion: CompletionOutput, first: bool
    ) -> dict[str, Any]:
        """Return what is new of a choice; ``first`` is whether nothing of it was told yet."""
        body = self._body
        text = completion.text
        echoed = self._prompt_text(i, output) if first and body.echo else ""
        choice: dict[str, Any] = {
            "index": i * self._n + completion.index,
            "text": echoed + text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = self._shape_logprobs(i, output, completion, first, echoed)
        if first and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                output.prompt_logprobs, body.prompt_logprobs
            )
        if body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
            choice["prompt_token_ids"] = output.prompt_token_ids if first else None
        return choice

    def _written(self, i: int, output: RequestOutput) -> str | None:
        """Return a prompt as the client wrote it, if it is a text and all of it was read."""
        prompt = self._run.prompts[i]
        cut = len(output.prompt_token_ids) < len(prompt["prompt_token_ids"])
        return None if cut else prompt.get("prompt")

    def _prompt_text(self, i: int, output: RequestOutput) -> str:
        text = self._written(i, output)
        if text is None:
            text = self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True)
        return text

    def _shape_logprobs(
        self,
        i: int,
        output: RequestOutput,
        completion: CompletionOutput,
        first: bool,
        echoed: str,
    ) -> dict[str, Any]:
        body = self._body
        assert body.logprobs is not None
        params = self._run.params
        index = i * self._n + completion.index
        end = None if body.stream else len(echoed) + len(completion.text)
        before = None
        if first:
            made = CompletionLogprobs(
                self._tokenizer, body.logprobs, as_ids=bool(body.return_tokens_as_token_ids)
            )
            self._logprobs[index] = made
            if body.echo:
                before = self._prompt_lists(made, i, output, len(echoed))
            made.start(
                len(echoed),
                output.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        after = self._logprobs[index].shape(completion.token_ids, completion.logprobs or (), end)
        return after if before is None else joined(before, after)

    def _prompt_lists(
        self, made: CompletionLogprobs, i: int, output: RequestOutput, length: int
    ) -> dict[str, Any]:
        ids = output.prompt_token_ids
        written = self._written(i, output)
        bos = self._tokenizer.bos_token
        added = (
            written is not None
            and ids[0] == self._tokenizer.bos_token_id
            and not written.startswith(bos or "")
        )
        # Special tokens show in a text that the client wrote, but for the BOS that was added.
        made.start(0, [], skip_special_tokens=written is None)
        lists = made.shape(ids, output.prompt_logprobs or [None] * len(ids), length)
        if added and bos:
            lists["text_offset"] = [max(0, offset - len(bos)) for offset in lists["text_offset"]]
        return lists


def _says_something(choice: dict[str, Any]) -> bool:
    return bool(
        choice["text"]
        or choice["finish_reason"]
        or choice["logprobs"] is not None
        or choice.get("token_ids")
    )


def _drop_token(completion: CompletionOutput) -> None:
    completion.text = ""
    completion.token_ids = []
    completion.logprobs = None if completion.logprobs is None else []
    completion.finish_reason = "length"
    completion.stop_reason = None
