"""``/v1/responses``: what a conversation goes on with, in items."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response

from quire.server.body import JsonRoute
from quire.server.chat_run import ChatRun, prepare_chat
from quire.server.disconnect import until_disconnect
from quire.server.errors import ApiError, as_api_error
from quire.server.fields import accept_fields
from quire.server.logprobs import ChatLogprobs
from quire.server.protocol.chat import ChatRequest
from quire.server.protocol.error import ERRORS
from quire.server.protocol.responses import ResponsesRequest
from quire.server.responses.builder import ResponseBuilder
from quire.server.responses.items import (
    chat_messages,
    chat_tool_choice,
    chat_tools,
    response_format,
)
from quire.server.service import Service, get_service
from quire.server.sse import event, json_response, stream_response
from quire.server.usage import Usage

if TYPE_CHECKING:
    from quire.outputs import RequestOutput

router = APIRouter(route_class=JsonRoute)

_LOGPROBS: Final = "message.output_text.logprobs"

_OWN_NAMES: Final = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of a chat, and what they are called here."""

_NESTED: Final = re.compile(r"(tools\[\d+\])\.function\b")

_PASSED_ON: Final = (
    "model",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "stream",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_whitespace_pattern",
    "guided_decoding_backend",
    "structural_tag",
    "priority",
    "request_id",
    "cache_salt",
    "vllm_xargs",
    "add_special_tokens",
)


@router.post("/v1/responses", responses=ERRORS)
async def create_response(
    body: ResponsesRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Go on with a conversation."""
    accept_fields(request, body, service)
    model = await service.open_model(body.model)
    if (body.n or 1) != 1:
        raise ApiError(400, f"n must be 1: a response has one answer, got {body.n}", param="n")
    if body.truncation not in (None, "disabled"):
        raise ApiError(
            400,
            f"truncation must be 'disabled': what is too long is refused, got {body.truncation!r}",
            param="truncation",
        )
    try:
        chat = await prepare_chat(service, _as_chat(body), model, kind="resp")
    except ApiError as error:
        raise _renamed(error) from None
    answer = _Answer(service, body, chat, model.name)
    if body.stream:
        return await stream_response(request, answer.events())
    try:
        [output] = await until_disconnect(request.receive, chat.run.all())
    except ApiError as error:
        raise _renamed(error) from None
    return json_response(answer.whole(output))


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    fields = {name: getattr(body, name) for name in _PASSED_ON}
    wants_logprobs = _LOGPROBS in (body.include or ())
    if body.top_logprobs is not None and not wants_logprobs:
        # OpenAI's own clients ask for them by either.
        wants_logprobs = body.top_logprobs != 0
    return ChatRequest.model_construct(
        **{name: value for name, value in fields.items() if value is not None},
        messages=chat_messages(body.input, body.instructions),
        max_completion_tokens=body.max_output_tokens,
        tools=chat_tools(body.tools),
        tool_choice=chat_tool_choice(body.tool_choice),
        response_format=response_format(None if body.text is None else body.text.format),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        logprobs=wants_logprobs or None,
        top_logprobs=body.top_logprobs if wants_logprobs else None,
    )


def _renamed(error: ApiError) -> ApiError:
    """Return an error with the names that fields have here."""
    nested = _NESTED.match(error.param or "")
    if nested:  # a chat's tools nest the function, which is flat here
        error.message = error.message.replace(nested[0], nested[1], 1)
        error.param = nested[1] + (error.param or "")[nested.end() :]
    for name, own in _OWN_NAMES.items():
        if error.param is not None and (error.param + ".").startswith((f"{name}.", f"{name}[")):
            error.param = own + error.param[len(name) :]
            if error.message.startswith(name):
                error.message = own + error.message[len(name) :]
            break
    return error


class _Answer:
    """The answer to a request, whole or in events."""

    def __init__(self, service: Service, body: ResponsesRequest, chat: ChatRun, model: str) -> None:
        params = chat.run.params
        self._chat = chat
        self._reader = chat.readers[0]
        self._usage = Usage()
        self._num_reasoning_tokens = 0
        self._logprobs: ChatLogprobs | None = None
        if chat.body.logprobs:
            self._logprobs = ChatLogprobs(
                service.tokenizer,
                body.top_logprobs or 0,
                as_ids=bool(body.return_tokens_as_token_ids),
            )
        form = None if body.text is None else body.text.format
        self._builder = ResponseBuilder(
            {
                "id": chat.run.id.replace("-", "_", 1),
                "object": "response",
                "created_at": int(time.time()),
                "model": model,
                "instructions": body.instructions,
                "max_output_tokens": body.max_output_tokens,
                "metadata": body.metadata or {},
                "parallel_tool_calls": body.parallel_tool_calls is not False,
                "previous_response_id": None,
                "reasoning": {
                    "effort": None if body.reasoning is None else body.reasoning.effort,
                    "summary": None,
                },
                "store": False,
                "temperature": params.temperature,
                "text": {"format": form or {"type": "text"}},
                "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
                "tools": [{"strict": None, **tool} for tool in body.tools or ()],
                "top_logprobs": body.top_logprobs or 0,
                "top_p": params.top_p,
                "truncation": "disabled",
                "user": body.user,
            }
        )

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """Return the answer in one piece."""
        self._take(output)
        return self._builder.response()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it comes; the last event has all of it."""
        begun = False
        try:
            async with aclosing(self._chat.run.outputs()) as outputs:
                async for _, output in outputs:
                    events = [] if begun else self._builder.start()
                    begun = True
                    events += self._take(output)
                    if events:
                        yield _written(events)
        except Exception as error:
            if not begun:  # it has a status of its own
                raise _renamed(error) if isinstance(error, ApiError) else error from None
            yield _written(self._builder.fail(as_api_error(error).message))

    def _take(self, output: RequestOutput) -> list[dict[str, Any]]:
        self._usage.add(0, output)
        events: list[dict[str, Any]] = []
        for completion in output.outputs:
            delta = self._reader.feed(completion.text)
            if delta.reasoning and not delta.content:
                self._num_reasoning_tokens += len(completion.token_ids)
            logprobs = None
            if self._logprobs is not None and completion.logprobs and not delta.reasoning:
                shaped = self._logprobs.shape(completion.token_ids, completion.logprobs)
                logprobs = shaped["content"]
            events += self._builder.feed(delta, logprobs)
            if completion.finish_reason is not None:
                events += self._builder.feed(self._reader.finish())
                events += self._builder.finish(completion.finish_reason, self._usage_shape())
        return events

    def _usage_shape(self) -> dict[str, Any]:
        usage = self._usage.shape()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }


def _written(events: list[dict[str, Any]]) -> bytes:
    return b"".join(event(each, each["type"]) for each in events)
