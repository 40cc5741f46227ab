"""What a request gives back.

The classes and field names are those that users of vLLM know, so that code written for its
outputs reads ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quire.errors import RequestFailedError
from quire.html import card

_MOST_SHOWN = 8
"""Completions, or numbers of a vector, that a notebook shows."""


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token under the model's own distribution.

    Attributes
    ----------
    logprob : float
        Natural logarithm of the probability, before penalties and temperature. In a beam search
        it is what beams are ranked by: after masks, biases, penalties and processors.
    rank : int or None
        1 for the most likely token of the vocabulary, 2 for the next, and so on.
    decoded_token : str or None
        The token's text, where a tokenizer is loaded.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id to :class:`Logprob`, for one position."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request.

    Attributes
    ----------
    index : int
        Which completion this is, from 0.
    text : str
        Its text: all of it, or the new part when the request asked for deltas.
    token_ids : list of int
        Its tokens, likewise.
    cumulative_logprob : float or None
        Sum of the chosen tokens' log-probabilities, when logprobs were asked for.
    logprobs : list of dict or None
        Per generated token, the asked-for candidates and the chosen token.
    finish_reason : {"stop", "length", "abort"} or None
        Why it ended; None while it runs.
    stop_reason : int, str or None
        The stop token id or stop string that ended it; None for EOS and for other reasons.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        """Return whether this completion has ended."""
        return self.finish_reason is not None

    def _rows(self) -> list[tuple[str, object]]:
        state = f"{len(self.token_ids)} tokens, {self.finish_reason or 'goes on'}"
        if self.stop_reason is not None:
            state += f": {self.stop_reason!r}"
        return [("text", self.text), ("", state)]

    def _repr_html_(self) -> str:
        return card(f"CompletionOutput {self.index}", self._rows())


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.monotonic()``."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced so far, or since the last output when deltas were asked for.

    Attributes
    ----------
    request_id : str
    prompt : str or None
        The prompt's text; None when it was given as token ids.
    prompt_token_ids : list of int
    prompt_logprobs : list or None
        One entry per prompt token; the first is None, since nothing precedes it.
    outputs : list of CompletionOutput
        Sorted by index.
    finished : bool
        Whether every completion has ended.
    num_cached_tokens : int
        Prompt tokens whose keys and values came from the prefix cache.
    embedding : list of float or None
        The prompt's vector, for a request that asked for one and no text.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int = 0
    embedding: list[float] | None = None

    def add(self, later: RequestOutput) -> None:
        """Take in the delta that follows, so that one stands for both."""
        by_index = {completion.index: completion for completion in self.outputs}
        for completion in later.outputs:
            own = by_index.get(completion.index)
            if own is None:
                self.outputs.append(completion)
                continue
            own.text += completion.text
            own.token_ids += completion.token_ids
            if completion.logprobs is not None:
                own.logprobs = (own.logprobs or []) + completion.logprobs
            own.cumulative_logprob = completion.cumulative_logprob
            own.finish_reason = completion.finish_reason
            own.stop_reason = completion.stop_reason
        self.outputs.sort(key=lambda completion: completion.index)
        self.prompt_logprobs = later.prompt_logprobs
        self.metrics = later.metrics
        self.num_cached_tokens = later.num_cached_tokens
        self.finished = later.finished

    def _repr_html_(self) -> str:
        prompt = str(self.prompt_token_ids[:100]) if self.prompt is None else self.prompt
        tokens = f"{len(self.prompt_token_ids)} tokens, {self.num_cached_tokens} of them cached"
        rows: list[tuple[str, object]] = [("prompt", prompt), ("", tokens)]
        if self.lora_request is not None:
            rows.append(("adapter", getattr(self.lora_request, "lora_name", self.lora_request)))
        for completion in self.outputs[:_MOST_SHOWN]:
            rows += completion._rows()
        if len(self.outputs) > _MOST_SHOWN:
            rows.append(("", f"and {len(self.outputs) - _MOST_SHOWN} more"))
        return card(f"RequestOutput {self.request_id}", rows)


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's vector.

    Attributes
    ----------
    embedding : list of float
        ``hidden_size`` numbers, or as many as ``dimensions`` asked for.
    """

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers there are."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What a request for an embedding gives back.

    Attributes
    ----------
    request_id : str
    outputs : EmbeddingOutput
    prompt_token_ids : list of int
    finished : bool
    num_cached_tokens : int
        Prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0

    @classmethod
    def of(cls, output: RequestOutput) -> EmbeddingRequestOutput:
        """Return what the engine's last output of such a request says.

        Raises
        ------
        RequestFailedError
            It was aborted.
        """
        if output.embedding is None:
            raise RequestFailedError(output.request_id, "it was aborted")
        return cls(
            request_id=output.request_id,
            outputs=EmbeddingOutput(output.embedding),
            prompt_token_ids=output.prompt_token_ids,
            num_cached_tokens=output.num_cached_tokens,
        )

    def _repr_html_(self) -> str:
        vector = self.outputs.embedding
        numbers = ", ".join(f"{number:.4f}" for number in vector[:_MOST_SHOWN])
        more = ", …" if len(vector) > _MOST_SHOWN else ""
        rows = [
            ("prompt", f"{len(self.prompt_token_ids)} tokens"),
            (f"{len(vector)} numbers", numbers + more),
        ]
        return card(f"EmbeddingRequestOutput {self.request_id}", rows)


@dataclass(slots=True)
class ClassificationOutput:
    """What a model's head says of a prompt's classes.

    Attributes
    ----------
    probs : list of float
        Their probabilities, or the head's own numbers where these were asked for.
    """

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)


@dataclass(slots=True)
class ClassificationRequestOutput:
    """What a request for classes gives back.

    Attributes
    ----------
    request_id : str
    outputs : ClassificationOutput
    prompt_token_ids : list of int
    finished : bool
    num_cached_tokens : int
        Prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts go together.

    Attributes
    ----------
    score : float
    """

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """What a request for a score gives back.

    Attributes
    ----------
    request_id : str
    outputs : ScoringOutput
    prompt_token_ids : list of int
        Of the pair as the model read it; of both texts, one after the other, where it read each.
    finished : bool
    num_cached_tokens : int
        Prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class BeamSearchSequence:
    """One hypothesis of a beam search.

    Attributes
    ----------
    tokens : list of int
        Prompt and generated tokens.
    cum_logprob : float
        Sum of the generated tokens' log-probabilities, not normalised by length.
    text : str
        The generated text.
    """

    tokens: list[int]
    cum_logprob: float
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]

    @classmethod
    def of(cls, output: RequestOutput) -> BeamSearchOutput:
        """Return the hypotheses of a finished request with ``use_beam_search``."""
        return cls(
            [
                BeamSearchSequence(
                    tokens=output.prompt_token_ids + list(beam.token_ids),
                    cum_logprob=beam.cumulative_logprob or 0.0,
                    text=beam.text,
                    finish_reason=beam.finish_reason,
                    stop_reason=beam.stop_reason,
                )
                for beam in output.outputs
            ]
        )
