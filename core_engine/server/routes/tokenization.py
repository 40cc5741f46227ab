"""``/tokenize`` and ``/detokenize``: text to tokens, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from quire.errors import InvalidRequestError
from quire.server.body import JsonRoute
from quire.server.chat_prompt import chat_prompt
from quire.server.errors import ApiError
from quire.server.fields import accept_fields
from quire.server.protocol.error import ERRORS
from quire.server.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from quire.server.sampling import field_error
from quire.server.service import Service, get_service
from quire.server.sse import json_response

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", responses=ERRORS)
async def tokenize(
    body: TokenizeRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Return the tokens of a text, or of a conversation as the chat template writes it."""
    accept_fields(request, body, service)
    await service.find_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    ids: list[int]
    if body.messages is not None:
        ids = (await chat_prompt(service, body))["prompt_token_ids"]
    else:
        special = body.add_special_tokens is not False
        try:
            ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt or "", special)
        except InvalidRequestError as error:
            raise field_error(error, body, "prompt") from None
    spelled = service.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return json_response(
        {
            "count": len(ids),
            "max_model_len": service.limits.max_model_len,
            "tokens": ids,
            "token_strs": spelled,
        }
    )


@router.post("/detokenize", responses=ERRORS)
async def detokenize(
    body: DetokenizeRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Return the text of tokens."""
    accept_fields(request, body, service)
    await service.find_model(body.model)
    size = service.limits.vocab_size
    for i, token_id in enumerate(body.tokens):
        if not 0 <= token_id < size:
            raise ApiError(
                400,
                f"tokens[{i}] must be in [0, {size - 1}], the model's vocabulary, got {token_id}",
                param=f"tokens[{i}]",
            )
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens)
    return json_response({"prompt": text})
