"""``/v1/chat/completions``: the next message of a conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from quire import __version__
from quire.server.body import JsonRoute
from quire.server.chat_run import ChatRun, prepare_chat
from quire.server.disconnect import until_disconnect
from quire.server.fields import accept_fields
from quire.server.logprobs import ChatLogprobs, prompt_logprobs
from quire.server.protocol.chat import ChatRequest
from quire.server.protocol.error import ERRORS
from quire.server.service import Service, get_service
from quire.server.sse import DONE, event, json_response, stream_response
from quire.server.usage import Usage

if TYPE_CHECKING:
    from quire.chat import ChatDelta, ChatReader
    from quire.outputs import CompletionOutput, RequestOutput

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=ERRORS)
async def create_chat_completion(
    body: ChatRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Write the next message of a conversation."""
    accept_fields(request, body, service)
    model = await service.open_model(body.model)
    chat = await prepare_chat(service, body, model, kind="chatcmpl")
    answer = _Answer(service, chat, model.name)
    if body.stream:
        return await stream_response(request, answer.events())
    [output] = await until_disconnect(request.receive, chat.run.all())
    return json_response(answer.whole(output))


@dataclass
class _Choice:
    """What is known of a choice while it is sent."""

    reader: ChatReader
    begun: bool = False


class _Answer:
    """The answer to a request, whole or in events."""

    def __init__(self, service: Service, chat: ChatRun, model: str) -> None:
        body, run = chat.body, chat.run
        self._body = body
        self._run = run
        self._choices = [_Choice(reader) for reader in chat.readers]
        self._usage = Usage()
        self._echoed = _last_text(body) if body.echo else ""
        self._shows_reasoning = body.include_reasoning is not False
        self._head = {
            "id": run.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"quire-{__version__}",
        }
        self._logprobs: ChatLogprobs | None = None
        if body.logprobs:
            self._logprobs = ChatLogprobs(
                service.tokenizer,
                body.top_logprobs or 0,
                as_ids=bool(body.return_tokens_as_token_ids),
            )

    # -- in one piece ----------------------------------------------------------------------------

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """Return the answer in one piece."""
        self._usage.add(0, output)
        answer: dict[str, Any] = {
            **self._head,
            "choices": [self._whole_choice(completion) for completion in output.outputs],
            "usage": self._usage.shape(),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                output.prompt_logprobs, self._body.prompt_logprobs
            )
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def _whole_choice(self, completion: CompletionOutput) -> dict[str, Any]:
        reader = self._choices[completion.index].reader
        reader.feed(completion.text)
        reader.finish()
        said = reader.message
        content = said.content
        if self._echoed:
            content = self._echoed + (content or "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if said.reasoning is not None and self._shows_reasoning:
            message["reasoning_content"] = message["reasoning"] = said.reasoning
        if said.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in said.tool_calls
            ]
        return self._choice(completion, "message", message, self._finish_reason(completion))

    # -- in events -------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it comes."""
        options = self._body.stream_options
        usage_at_end = options is not None and bool(options.include_usage)
        usage_always = options is not None and bool(options.continuous_usage_stats)
        async with aclosing(self._run.outputs()) as outputs:
            async for i, output in outputs:
                self._usage.add(i, output)
                extra: dict[str, Any] = {}
                if usage_always:
                    extra["usage"] = self._usage.shape()
                elif usage_at_end:
                    extra["usage"] = None
                parts = []
                for completion in output.outputs:
                    if self._body.return_token_ids and not self._choices[completion.index].begun:
                        extra["prompt_token_ids"] = output.prompt_token_ids
                    for choice in self._chunk_choices(completion):
                        parts.append(event({**self._head, "choices": [choice], **extra}))
                        extra.pop("prompt_token_ids", None)
                if parts:
                    yield b"".join(parts)
        if usage_at_end:
            yield event({**self._head, "choices": [], "usage": self._usage.shape()})
        yield DONE

    def _chunk_choices(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """Return what chunks are to say of what is new of a choice."""
        state = self._choices[completion.index]
        reader = state.reader
        made = []
        if not state.begun:
            state.begun = True
            opening = {"role": "assistant", "content": self._echoed}
            made.append(_chunk_choice(completion.index, opening))
        delta = self._shape_delta(reader.feed(completion.text))
        if completion.finish_reason is None:
            if delta or self._logprobs is not None or self._body.return_token_ids:
                made.append(self._choice(completion, "delta", delta, None))
            return made
        rest = self._shape_delta(reader.finish())
        if delta and rest:
            made.append(_chunk_choice(completion.index, delta))
        # What comes last has the reason to end, and all that belongs to the step's tokens.
        reason = self._finish_reason(completion)
        made.append(self._choice(completion, "delta", rest or delta, reason))
        return made

    def _shape_delta(self, delta: ChatDelta) -> dict[str, Any]:
        shaped: dict[str, Any] = {}
        if delta.reasoning and self._shows_reasoning:
            shaped["reasoning_content"] = shaped["reasoning"] = delta.reasoning
        if delta.content:
            shaped["content"] = delta.content
        if delta.tool_calls:
            shaped["tool_calls"] = calls = []
            for call in delta.tool_calls:
                function: dict[str, Any] = {"arguments": call.arguments}
                item: dict[str, Any] = {"index": call.index, "function": function}
                if call.id is not None:
                    item.update(id=call.id, type="function")
                if call.name is not None:
                    function["name"] = call.name
                calls.append(item)
        return shaped

    # -- both ------------------------------------------------------------------------------------

    def _choice(
        self, completion: CompletionOutput, name: str, said: dict[str, Any], reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            name: said,
            "logprobs": None,
            "finish_reason": reason,
        }
        if reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if self._logprobs is not None:
            choice["logprobs"] = self._logprobs.shape(
                completion.token_ids, completion.logprobs or ()
            )
        if self._body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        # An answer that was cut off is cut off, whatever calls it has.
        calls = self._choices[completion.index].reader.has_tool_calls
        return (
            "tool_calls"
            if calls and completion.finish_reason == "stop"
            else (completion.finish_reason)
        )


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _last_text(body: ChatRequest) -> str:
    """Return the text of the last message, if it is the assistant's."""
    last = body.messages[-1] if body.messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
