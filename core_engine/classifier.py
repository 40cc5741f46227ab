"""Classifier: classes and scores, from the states of prompts that an engine reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError, NotSupportedError
from quire.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from quire.pooling_params import PoolingParams

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.models.classes import ClassificationHead
    from quire.outputs import EmbeddingRequestOutput
    from quire.prompts import Prompt
    from quire.tokenizer.tokenizer import Tokenizer

Embed = Callable[[Sequence["Prompt"], PoolingParams], "list[EmbeddingRequestOutput]"]


class Classifier:
    """The head of a model for classes, read when it is first needed.

    Parameters
    ----------
    config : EngineConfig
    hidden_size : int
        Of the model.
    """

    def __init__(self, config: EngineConfig, hidden_size: int) -> None:
        self._config = config
        self._hidden_size = hidden_size
        self._head: ClassificationHead | None = None
        self._lock = threading.Lock()

    def head(self) -> ClassificationHead:
        """Return the head.

        Raises
        ------
        NotSupportedError
            The model has none.
        ModelLoadError
            It does not fit.
        """
        from quire.models import hub
        from quire.models.classes import ClassificationHead
        from quire.models.hf_config import read_config
        from quire.models.registry import is_classifier

        with self._lock:
            if self._head is None:
                path = hub.resolve_model(self._config.model)
                hf_config = read_config(path, self._config.model.hf_overrides)
                if not is_classifier(hf_config):
                    raise NotSupportedError(
                        f"{self._config.model.model!r} has no head for classes: architectures in "
                        f"its config.json is {hf_config.get('architectures')!r}, which would have "
                        "to be one of the ...ForSequenceClassification"
                    )
                self._head = ClassificationHead.read(path, hf_config, self._hidden_size)
            return self._head

    def classify(
        self,
        prompts: Sequence[Prompt],
        embed: Embed,
        *,
        activates: bool,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Return the classes of prompts, in their order."""
        head = self.head()
        states = embed(
            prompts, PoolingParams(normalize=False, truncate_prompt_tokens=truncate_prompt_tokens)
        )
        return [
            ClassificationRequestOutput(
                each.request_id,
                ClassificationOutput(head.apply(each.outputs.embedding, activates=activates)),
                each.prompt_token_ids,
                num_cached_tokens=each.num_cached_tokens,
            )
            for each in states
        ]

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        embed: Embed,
        tokenizer: Tokenizer,
        *,
        activates: bool,
        has_head: bool,
    ) -> list[ScoringRequestOutput]:
        """Return how well the texts of each pair go together."""
        for i, pair in enumerate(pairs):
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise InvalidRequestError(f"pair {i} must be two texts, not {pair!r}"[:300])
        if not has_head:
            return _by_cosine(pairs, embed)
        head = self.head()
        if head.num_classes != 1:
            raise NotSupportedError(
                f"the model has {head.num_classes} classes; a score of two texts is the one class "
                "of a model that was trained for it: use LLM.classify"
            )
        found = self.classify(
            [_pair_ids(tokenizer, *pair) for pair in pairs], embed, activates=activates
        )
        return [
            ScoringRequestOutput(
                each.request_id,
                ScoringOutput(each.outputs.probs[0]),
                each.prompt_token_ids,
                num_cached_tokens=each.num_cached_tokens,
            )
            for each in found
        ]


def _pair_ids(tokenizer: Tokenizer, first: str, second: str) -> list[int]:
    """Return two texts as one prompt, as the tokenizer itself writes pairs."""
    backend: Any = tokenizer.backend
    encode = getattr(backend, "encode", None)
    pair = encode(first, second) if encode is not None else None
    ids = getattr(pair, "ids", pair)
    return [int(id_) for id_ in ids or ()]


def _by_cosine(pairs: Sequence[tuple[str, str]], embed: Embed) -> list[ScoringRequestOutput]:
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    found = dict(zip(texts, embed(texts, PoolingParams()), strict=True))
    scores = []
    for first, second in pairs:
        one, other = found[first], found[second]
        product = sum(
            a * b for a, b in zip(one.outputs.embedding, other.outputs.embedding, strict=True)
        )
        scores.append(
            ScoringRequestOutput(
                f"{one.request_id}_{other.request_id}",
                ScoringOutput(product),
                one.prompt_token_ids + other.prompt_token_ids,
                num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
            )
        )
    return scores
