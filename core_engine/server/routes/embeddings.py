"""``/v1/embeddings``: texts to vectors."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

from quire.errors import InvalidRequestError
from quire.pooling_params import PoolingParams
from quire.server.body import JsonRoute
from quire.server.disconnect import until_disconnect
from quire.server.errors import ApiError
from quire.server.fields import accept_fields
from quire.server.protocol.embeddings import EmbeddingRequest
from quire.server.protocol.error import ERRORS
from quire.server.runs import tokenized
from quire.server.sampling import field_error
from quire.server.service import Service, get_service
from quire.server.sse import json_response

if TYPE_CHECKING:
    from quire.outputs import EmbeddingRequestOutput
    from quire.prompts import TokensPrompt
    from quire.server.adapters import OpenModel

router = APIRouter(route_class=JsonRoute)

_MOST_INPUTS = 2048


@router.post("/v1/embeddings", responses=ERRORS)
async def create_embeddings(
    body: EmbeddingRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> Response:
    """Turn texts into vectors: pooled hidden states of the model."""
    accept_fields(request, body, service)
    model = await service.open_model(body.model)
    given = body.input
    if len(given) > _MOST_INPUTS:
        raise ApiError(
            400, f"input must have at most {_MOST_INPUTS} texts, got {len(given)}", param="input"
        )
    try:
        pooling = PoolingParams(
            pooling=body.pooling,
            normalize=body.normalize is not False,
            dimensions=body.dimensions,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
        )
    except InvalidRequestError as error:
        raise field_error(error, body) from None
    prompts = await tokenized(service, given, body)
    outputs = await until_disconnect(request.receive, _all(service, body, prompts, pooling, model))
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return json_response(
        {
            "object": "list",
            "model": model.name,
            "data": [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": _encoded(output, body.encoding_format),
                }
                for i, output in enumerate(outputs)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _all(
    service: Service,
    body: EmbeddingRequest,
    prompts: list[TokensPrompt],
    pooling: PoolingParams,
    model: OpenModel,
) -> list[EmbeddingRequestOutput]:
    # One request of many texts must not be what keeps others, or its own last ones, out.
    room = asyncio.Semaphore(service.llm.config.scheduler.max_num_seqs)

    async def one(prompt: TokensPrompt) -> EmbeddingRequestOutput:
        async with room:
            return await service.llm.embed(prompt, pooling, lora_request=model.adapter)

    tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    except InvalidRequestError as error:
        raise field_error(error, body, "input") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encoded(output: EmbeddingRequestOutput, encoding: str | None) -> Any:
    values = output.outputs.embedding
    if encoding != "base64":
        return values
    return base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode()
