"""vLLM's outputs of models that return numbers; those of texts are quire's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from quire.outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    ScoringOutput,
    TokenLogprobs,
)

if TYPE_CHECKING:
    import torch

PromptLogprobs = list[TokenLogprobs | None]
SampleLogprobs = list[TokenLogprobs]

T = TypeVar("T")


@dataclass
class PoolingOutput:
    """What a model's head, or its last states, gave for a prompt.

    Attributes
    ----------
    data : Tensor
        ``[hidden_size]`` of an embedding, ``[num_classes]`` of a classification.
    """

    data: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoolingOutput) and bool((self.data == other.data).all())


@dataclass
class PoolingRequestOutput(Generic[T]):
    """What a request for numbers gives back.

    Attributes
    ----------
    request_id : str
    outputs
        By the kind of request.
    prompt_token_ids : list of int
    num_cached_tokens : int
        Prompt tokens whose keys and values came from the prefix cache.
    finished : bool
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Of :meth:`LLM.embed`."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """Of :meth:`LLM.classify`."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Of :meth:`LLM.score`."""


__all__ = [
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "PoolingOutput",
    "PoolingRequestOutput",
    "PromptLogprobs",
    "SampleLogprobs",
    "ScoringOutput",
    "ScoringRequestOutput",
]
