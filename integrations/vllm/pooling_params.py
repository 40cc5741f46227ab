"""vLLM's PoolingParams: quire's, with the fields that only vLLM knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.integrations.vllm.exceptions import VLLMValidationError
from quire.pooling_params import PoolingParams as QuirePoolingParams
from quire.sampling_params import RequestOutputKind
from quire.utils.keywords import refuse_unknown_keywords


@refuse_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class PoolingParams(QuirePoolingParams):
    """How a prompt's hidden states become one vector, see :class:`quire.PoolingParams`.

    Parameters
    ----------
    use_activation : bool, optional
        Whether what the model's head gives is normalized: by its length for embeddings, to
        probabilities for classes. None: yes.
    softmax, activation : bool, optional
        Former names of ``use_activation``.
    task : str, optional
        What it is for; the method that is called says so as well.
    skip_reading_prefix_cache, requires_token_ids, extra_kwargs, output_kind
        Without effect.
    """

    use_activation: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    task: str | None = None
    skip_reading_prefix_cache: bool | None = None
    requires_token_ids: bool = False
    extra_kwargs: dict[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InvalidRequestError as error:
            raise VLLMValidationError(str(error)) from error

    @property
    def activates(self) -> bool:
        """Whether the head's result is normalized."""
        said = (self.use_activation, self.softmax, self.activation)
        return next((each for each in said if each is not None), True)

    def to_quire(self) -> QuirePoolingParams:
        """Return what the engine is told of a request for an embedding."""
        return QuirePoolingParams(
            pooling=self.pooling,
            normalize=self.normalize and self.activates,
            dimensions=self.dimensions,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )
