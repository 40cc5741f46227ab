"""A request as the engine receives it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.models.adapter import PreparedAdapter
    from quire.pooling_params import PoolingParams
    from quire.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A validated request, ready to be scheduled.

    Attributes
    ----------
    prompt : str or None
        The text it came from; None when it came as token ids.
    prompt_token_ids : list of int
        At least one token.
    params : SamplingParams
        Complete and valid for the model: ``max_tokens`` is set, stop token ids are resolved.
    seed : int
        Seed of the request's own randomness; each of its ``n`` samples derives its own from it.
    priority : int
        Lower runs earlier where the scheduling policy is ``"priority"``.
    cache_salt : str or None
        Requests with different salts share no prefix blocks.
    bad_words_ids : list of list of int
        The tokenizations of ``params.bad_words``.
    lora_request : object
        The adapter as the caller named it, for the outputs.
    adapter : PreparedAdapter or None
        The adapter itself.
    pooling : PoolingParams or None
        What becomes of the prompt's hidden states, where these are wanted and no text.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    arrival_time: float = field(default_factory=time.monotonic)
    lora_request: Any = None
    cache_salt: str | None = None
    bad_words_ids: list[list[int]] = field(default_factory=list)
    pooling: PoolingParams | None = None
    adapter: PreparedAdapter | None = None
