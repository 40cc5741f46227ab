"""Pooling: what an LLM makes of prompts that it only reads: vectors, classes and scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quire.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from quire.prompts import Prompt, as_prompts
from quire.waiting import wait_for_all

if TYPE_CHECKING:
    from quire.classifier import Classifier
    from quire.lifetime import Lifetime
    from quire.pooling_params import PoolingParams
    from quire.request_maker import RequestMaker


class Pooling:
    """The part of :class:`quire.LLM` that generates nothing."""

    _lifetime: Lifetime
    _classifier: Classifier

    @abstractmethod
    def _open_maker(self) -> RequestMaker: ...

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turn prompts into vectors: pooled hidden states of the model.

        Parameters
        ----------
        prompts, use_tqdm, lora_request
            As in :meth:`generate`.
        pooling_params : PoolingParams, or one per prompt, optional

        Returns
        -------
        list of EmbeddingRequestOutput
            In the order of the prompts.

        Raises
        ------
        InvalidRequestError, RequestFailedError, EngineClosedError
            As from :meth:`generate`.
        """
        requests = self._open_maker().embeddings(as_prompts(prompts), pooling_params, lora_request)
        results = wait_for_all(self._lifetime.start, requests, use_tqdm)
        for result in results:
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:  # the exception has this frame, which would have the exception
                    del results, result
        return [EmbeddingRequestOutput.of(r) for r in results if isinstance(r, RequestOutput)]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        activates: bool = True,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
    ) -> list[ClassificationRequestOutput]:
        """Return the probabilities of prompts' classes, of a model with a head for them.

        Parameters
        ----------
        prompts, use_tqdm, lora_request
            As in :meth:`generate`.
        activates : bool
            As probabilities; else as the numbers that the head gives.
        truncate_prompt_tokens : int, optional
            Keep that many of a prompt's last tokens; -1 as many as there is room for.

        Raises
        ------
        NotSupportedError
            The model has no such head: it is no ``...ForSequenceClassification``.
        InvalidRequestError, RequestFailedError, EngineClosedError
            As from :meth:`generate`.
        """
        return self._classifier.classify(
            as_prompts(prompts),
            partial(self.embed, use_tqdm=use_tqdm, lora_request=lora_request),
            activates=activates,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        activates: bool = True,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
    ) -> list[ScoringRequestOutput]:
        """Return how well the two texts of each pair go together.

        By the head of a model that has one for a single class, which reads both texts as one
        prompt; by the cosine of their embeddings else.

        Parameters
        ----------
        pairs : list of (str, str)
        activates, use_tqdm, lora_request
            As in :meth:`classify`.
        """
        return self._classifier.score(
            pairs,
            partial(self.embed, use_tqdm=use_tqdm, lora_request=lora_request),
            self._open_maker().tokenizer,
            activates=activates,
            has_head=self.num_classes is not None,
        )

    @property
    def num_classes(self) -> int | None:
        """How many classes the model's head has; None: it has none, and generates."""
        if self._open_maker().processor.limits.generates:
            return None
        return self._classifier.head().num_classes
