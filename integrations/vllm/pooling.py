"""Embeddings, classes and scores, in the forms in which vLLM returns them."""

from __future__ import annotations

from typing import Any

import quire
from quire.errors import InvalidRequestError, NotSupportedError
from quire.integrations.vllm.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from quire.integrations.vllm.pooling_params import PoolingParams
from quire.integrations.vllm.prompts import all_prompts, pooling_for_quire, token_limit
from quire.pooling_params import PoolingParams as QuirePoolingParams

_MANNERS = ("use_tqdm", "lora_request")


def _options(options: dict[str, Any]) -> dict[str, Any]:
    others = set(options) - {*_MANNERS, "tokenization_kwargs", "pooling_params"}
    if others:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(others))}")
    return {name: options[name] for name in _MANNERS if name in options}


def _pooling(params: Any, options: dict[str, Any]) -> Any:
    limit = token_limit(options.get("tokenization_kwargs"))
    found = pooling_for_quire(params)
    if limit is not None:
        if found is not None:
            raise InvalidRequestError(
                "truncate_prompt_tokens is given with tokenization_kwargs, beside pooling_params: "
                "give it there"
            )
        return QuirePoolingParams(truncate_prompt_tokens=limit)
    return found


def embed(
    llm: quire.LLM, prompts: Any, *, pooling_params: Any = None, **options: Any
) -> list[EmbeddingRequestOutput]:
    """Turn prompts into vectors."""
    manners = _options(options)
    found = llm.embed(all_prompts(prompts), _pooling(pooling_params, options), **manners)
    return [
        EmbeddingRequestOutput(
            each.request_id, each.outputs, each.prompt_token_ids, each.num_cached_tokens
        )
        for each in found
    ]


def classify(
    llm: quire.LLM, prompts: Any, *, pooling_params: Any = None, **options: Any
) -> list[ClassificationRequestOutput]:
    """Return the probabilities of prompts' classes."""
    manners = _options(options)
    activates = pooling_params.activates if isinstance(pooling_params, PoolingParams) else True
    limit = token_limit(options.get("tokenization_kwargs"))
    found = llm.classify(
        all_prompts(prompts), activates=activates, truncate_prompt_tokens=limit, **manners
    )
    return [
        ClassificationRequestOutput(
            each.request_id,
            each.outputs,
            each.prompt_token_ids,
            each.num_cached_tokens,
        )
        for each in found
    ]


def encode(
    llm: quire.LLM,
    prompts: Any,
    pooling_params: Any = None,
    *,
    pooling_task: str | None = None,
    **options: Any,
) -> list[PoolingRequestOutput[Any]]:
    """Return what a model's head, or its last states, give for prompts, as tensors."""
    import torch

    task = pooling_task or getattr(pooling_params, "task", None)
    if task is None:
        task = "embed" if llm.num_classes is None else "classify"
    if task not in ("embed", "classify"):
        raise NotSupportedError(f"pooling_task={task!r} is not offered; there are: embed, classify")
    if task == "classify":
        classes = classify(llm, prompts, pooling_params=pooling_params, **options)
        return [_as_tensor(each, torch.tensor(each.outputs.probs)) for each in classes]
    vectors = embed(llm, prompts, pooling_params=pooling_params, **options)
    return [_as_tensor(each, torch.tensor(each.outputs.embedding)) for each in vectors]


def _as_tensor(found: PoolingRequestOutput[Any], data: Any) -> PoolingRequestOutput[Any]:
    return PoolingRequestOutput(
        found.request_id, PoolingOutput(data), found.prompt_token_ids, found.num_cached_tokens
    )


def score(llm: quire.LLM, data_1: Any, data_2: Any, **options: Any) -> list[ScoringRequestOutput]:
    """Return how well texts go together, pair by pair."""
    first: Any
    second: Any
    first, second = ([each] if isinstance(each, (str, dict)) else each for each in (data_1, data_2))
    if not (isinstance(first, (list, tuple)) and isinstance(second, (list, tuple))):
        raise InvalidRequestError("score takes two texts, or lists of texts")
    first = list(first)
    num_first = len(first)
    if len(first) == 1:
        first *= len(second)
    if not first or len(first) != len(second):
        raise InvalidRequestError(
            f"score takes one text against many, or as many as the other: {num_first} and "
            f"{len(second)} were given"
        )
    options.pop("chat_template", None)
    pooling = options.pop("pooling_params", None)
    found = llm.score(
        list(zip(first, second, strict=True)),
        activates=pooling.activates if isinstance(pooling, PoolingParams) else True,
        **_options(options),
    )
    return [
        ScoringRequestOutput(
            each.request_id,
            each.outputs,
            each.prompt_token_ids,
            each.num_cached_tokens,
        )
        for each in found
    ]
