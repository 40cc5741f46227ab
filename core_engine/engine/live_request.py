"""LiveRequest: a request inside the engine, with its sequences and what they said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quire.engine.completion import Completion
from quire.engine.pooler import Pooler
from quire.errors import RequestFailedError
from quire.outputs import RequestMetrics, RequestOutput, TokenLogprobs
from quire.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from quire.engine.request import Request
    from quire.engine.sequence import Sequence
    from quire.sampling.beam_search import BeamSearch
    from quire.structured.validator import Validator
    from quire.tokenizer.tokenizer import Tokenizer


class LiveRequest:
    """One request from :meth:`Engine.add_request` to its last output.

    Attributes
    ----------
    sequences : dict of int to Sequence
        Those not yet finished, by index.
    deferred : list of Sequence
        Samples that wait for the first one to compute the prompt they share; all of them while
        the request waits for its grammar.
    completions : dict of int to Completion
    eos_token_ids : frozenset of int
        Tokens that end its texts; none when they are to be ignored.
    stop_token_ids : frozenset of int
        Further tokens that end them, by the request's own wish.
    validator : Validator or None
        What each of its whole texts has to pass before it is told.
    beam : BeamSearch or None
        The search, for a request that asked for one.
    pooler : Pooler or None
        What its prompt's hidden states go to, for a request that wants an embedding.
    prompt_logprobs : list or None
        One entry per prompt token so far, the first of them None.
    quiet : Completion or None
        Its only completion, of which nothing is told or wanted but tokens until it ends; set
        when it has begun.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        beam: BeamSearch | None,
    ) -> None:
        self.request = request
        self.beam = beam
        self.validator: Validator | None = None
        self._validated: set[int] = set()
        self.candidates: dict[int, tuple[list[int], list[float]]] = {}
        self.beam_order: list[int] = []
        self.sequences: dict[int, Sequence] = {}
        self.deferred: list[Sequence] = []
        self.completions: dict[int, Completion] = {}
        self.num_sequences = 0
        self.private_keys: set[bytes] = set()
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if request.params.prompt_logprobs is None else [None]
        )
        self.pooler = (
            None
            if request.pooling is None
            else Pooler(request.pooling, len(request.prompt_token_ids))
        )
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.num_cached_tokens = 0
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.stop_token_ids = frozenset(request.params.stop_token_ids or ())
        self.quiet: Completion | None = None

    def start_completion(self, index: int, token_ids: list[int]) -> Completion:
        """Begin the output of sequence ``index`` over its list of tokens."""
        completion = Completion(self.request, index, token_ids, self._tokenizer, self.eos_token_ids)
        self.completions[index] = completion
        return completion

    def quiet_completion(self) -> Completion | None:
        """Return what ``quiet`` is to be once the request has begun."""
        params = self.request.params
        if (
            self.beam is None
            and params.num_sequences == 1
            and params.logprobs is None
            and params.output_kind == RequestOutputKind.FINAL_ONLY
        ):
            return self.completions[0]
        return None

    @property
    def reads_prompt(self) -> bool:
        """Whether it wants to see hidden states of its prompt."""
        return self.prompt_logprobs is not None or self.pooler is not None

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether it wants to see all of them, so that none may come from the prefix cache."""
        return self.prompt_logprobs is not None or (
            self.pooler is not None and self.pooler.reads_all
        )

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return not self.sequences and not self.deferred

    def abort(self) -> None:
        """Mark what has not ended as aborted."""
        if not self.completions:
            self.start_completion(0, [])
        for completion in self.completions.values():
            if completion.finish_reason is None:
                completion.finish_reason = "abort"

    def output(self) -> RequestOutput | None:
        """Return what the request wants to be told now, or None.

        Raises
        ------
        RequestFailedError
            A whole text is not valid.
        """
        params = self.request.params
        held_back = self.beam is not None or params.num_sequences > params.n
        finished = self.finished
        if not finished and (held_back or params.output_kind == RequestOutputKind.FINAL_ONLY):
            return None
        completions = list(self.completions.values())
        if held_back:
            completions = self._best(completions)
        if self.validator is not None:
            self._validate(self.validator, completions)
        if held_back:
            outputs = [c.output() for c in completions]
        elif params.output_kind == RequestOutputKind.DELTA:
            outputs = [c.delta() for c in completions if c.has_news()]
        else:
            outputs = [c.output() for c in completions]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            # Copies: what a caller does to its outputs must not reach what is being computed.
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs=outputs,
            finished=finished,
            metrics=self.metrics,
            lora_request=self.request.lora_request,
            num_cached_tokens=self.num_cached_tokens,
            embedding=self._embedding(),
        )

    def _embedding(self) -> list[float] | None:
        aborted = any(c.finish_reason == "abort" for c in self.completions.values())
        return None if self.pooler is None or aborted else self.pooler.vector()

    def _validate(self, validator: Validator, completions: list[Completion]) -> None:
        for completion in completions:
            if completion.index in self._validated or not completion.is_whole:
                continue
            self._validated.add(completion.index)
            try:
                cut = completion.stop_reason is not None
                validator.check(completion.text_token_ids(), may_be_cut=cut)
            except ValueError as error:
                which = f"sample {completion.index}: " if len(completions) > 1 else ""
                raise RequestFailedError(self.request.request_id, f"{which}{error}") from error

    def _best(self, completions: list[Completion]) -> list[Completion]:
        """Return the best ``n``, numbered anew; a beam search has ranked its own."""
        if self.beam is None:
            completions.sort(key=lambda c: -c.cumulative_logprob)
            completions = completions[: self.request.params.n]
        for index, completion in enumerate(completions):
            completion.index = index
        return completions


def count_adapters(requests: Iterable[LiveRequest]) -> dict[str, tuple[int, int]]:
    """Return by adapters' names how many requests with them have begun, and how many wait."""
    counts: dict[str, tuple[int, int]] = {}
    for live in requests:
        wanted = live.request.lora_request
        if wanted is None:
            continue
        name = wanted if isinstance(wanted, str) else wanted.lora_name
        begun, waiting = counts.get(name, (0, 0))
        if live.metrics.first_scheduled_time is None:
            counts[name] = begun, waiting + 1
        else:
            counts[name] = begun + 1, waiting
    return counts
