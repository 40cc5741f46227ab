"""ChatRun: a conversation that the model goes on with, and what reads its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.server.chat_prompt import chat_prompt
from quire.server.errors import ApiError
from quire.server.runs import Run
from quire.server.sampling import check_stream_fields, field_error, sampling_params

if TYPE_CHECKING:
    from quire.chat import ChatReader
    from quire.sampling_params import SamplingParams
    from quire.server.adapters import OpenModel
    from quire.server.protocol.chat import ChatRequest
    from quire.server.service import Service

_PROMPT_END: Final = 4096
"""Characters of a prompt's end that show whether the model has begun to think there."""


@dataclass(frozen=True)
class ChatRun:
    """What :func:`prepare_chat` makes of a request.

    Attributes
    ----------
    body : ChatRequest
    run : Run
        Of one prompt.
    readers : list of ChatReader
        One per answer.
    """

    body: ChatRequest
    run: Run
    readers: list[ChatReader]


async def prepare_chat(
    service: Service, body: ChatRequest, model: OpenModel, *, kind: str
) -> ChatRun:
    """Check a request and write its prompt; nothing runs yet.

    Parameters
    ----------
    service : Service
    body : ChatRequest
    model : OpenModel
        What it asks for.
    kind : str
        What the answer's id begins with.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    check_stream_fields(body)
    _check_fields(body)
    defaults = await service.llm.get_default_sampling_params()
    params = sampling_params(service, body, defaults, **_overrides(body, defaults))
    tools = body.tools or None
    choice = "auto" if body.tool_choice is None else body.tool_choice
    parallel = body.parallel_tool_calls is not False
    variables = {}
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    prompt = await chat_prompt(service, body, **variables)
    text = prompt.get("prompt", "")
    chat_format = service.chat_format
    try:
        end = text[-_PROMPT_END:]
        params = chat_format.constrain(params, tools, choice, parallel, end)
        readers = [chat_format.reader(tools, choice, parallel, prompt=end) for _ in range(params.n)]
    except InvalidRequestError as error:
        raise field_error(error, body) from None
    run = Run(service, body, [prompt], params, model=model, prompt_field="messages", kind=kind)
    return ChatRun(body, run, readers)


def _check_fields(body: ChatRequest) -> None:
    for i, item in enumerate(body.modalities or ()):
        if item != "text":
            raise ApiError(
                400,
                f"modalities[{i}] must be 'text', which is what models here write, got {item!r}",
                param=f"modalities[{i}]",
                code="unsupported_parameter",
            )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400,
            f"top_logprobs needs logprobs=true, got {body.top_logprobs} without it",
            param="top_logprobs",
        )


def _overrides(body: ChatRequest, defaults: SamplingParams) -> dict[str, Any]:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    if max_tokens is None and "max_tokens" in defaults.explicit_fields:
        max_tokens = defaults.max_tokens
    return {"logprobs": logprobs, "max_tokens": max_tokens}
