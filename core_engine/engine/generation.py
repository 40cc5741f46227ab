"""Generation: the tokens that a step chose, on their way to sequences and requests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.beams import report_candidates
from quire.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from quire.engine.completion import Completion
    from quire.engine.constraints import RequestConstraints
    from quire.engine.live_request import LiveRequest
    from quire.engine.metrics import EngineMetrics
    from quire.engine.running import RunningSequences
    from quire.engine.token_logprobs import TokenLogprobsMaker
    from quire.sampling.sampler import LogprobsTensors, Sampler, SamplerOutput
    from quire.structured.masks import Masks


@dataclass(slots=True)
class StepNews:
    """What comes of a step.

    Attributes
    ----------
    failed : dict of str to BaseException
        Requests that cannot go on, and why.
    touched : dict of str to LiveRequest
        Requests that may have something to tell.
    """

    failed: dict[str, BaseException]
    touched: dict[str, LiveRequest] = field(default_factory=dict)


class Generation:
    """Gives sequences their next tokens, be they sampled, drafted or forced.

    Parameters
    ----------
    sampler : Sampler
    running : RunningSequences
    constraints : RequestConstraints
    logprobs : TokenLogprobsMaker
    requests : mapping of str to LiveRequest
        The engine's own, which changes.
    metrics : EngineMetrics
        Counted up.
    """

    def __init__(
        self,
        sampler: Sampler,
        running: RunningSequences,
        constraints: RequestConstraints,
        logprobs: TokenLogprobsMaker,
        requests: Mapping[str, LiveRequest],
        metrics: EngineMetrics,
    ) -> None:
        self._sampler = sampler
        self._running = running
        self._constraints = constraints
        self._logprobs = logprobs
        self._requests = requests
        self._metrics = metrics

    def append(
        self,
        sequences: list[Sequence],
        rows: npt.NDArray[np.int64],
        sampled: SamplerOutput,
        news: StepNews,
    ) -> None:
        """Give sequences their tokens, and take note of the requests that were touched or fail."""
        requests = self._requests
        failures, logprobs = sampled.failures, sampled.logprobs
        self._running.table.append(rows, sampled.token_ids)
        failed, touched = news.failed, news.touched
        now = time.monotonic()
        self._metrics.num_generation_tokens += len(sequences) - len(failures)
        for i, token_id in enumerate(sampled.token_ids.tolist()):
            sequence = sequences[i]
            live = requests[sequence.request_id]
            if i in failures:
                failed.setdefault(sequence.request_id, failures[i])
                continue
            try:
                completion = live.quiet
                if completion is not None:
                    if not _append_token(sequence, completion, token_id):
                        continue
                    self._running.finish(live, sequence)
                elif live.beam is not None:
                    assert logprobs is not None
                    report_candidates(live, sequence, self._running, logprobs, i)
                else:
                    self._append_one(live, sequence, token_id, logprobs, i)
            except Exception as error:  # such as a tokenizer's: it concerns this request alone
                failed.setdefault(sequence.request_id, error)
            touched[sequence.request_id] = live
            if live.metrics.first_token_time is None:
                self._begin(live, now)

    def append_with_drafts(
        self,
        sequences: list[Sequence],
        num_drafts: list[int],
        rows: npt.NDArray[np.int64],
        logits: torch.Tensor,
        masks: Masks | None,
        news: StepNews,
    ) -> None:
        """Give sequences tokens for as long as they are their drafts, and one more.

        The rows are sampled as in so many steps, so that each sees its penalties, processors and
        random numbers as it would without drafts.
        """
        counts = np.array(num_drafts)
        places = np.cumsum(counts + 1) - counts - 1
        offset = 0
        while True:
            part = logits[torch.from_numpy(places).to(logits.device)]
            found = None if masks is None else masks.select(places)
            sampled = self._sampler.sample(part, rows, found)
            self.append(sequences, rows, sampled, news)
            going_on = [
                i
                for i, sequence in enumerate(sequences)
                if offset < counts[i]
                and sequence.status is SequenceStatus.RUNNING
                and sequence.request_id not in news.failed
                and sequence.output_token_ids[-1] == sequence.draft_token_ids[offset]
            ]
            if not going_on:
                return
            sequences = [sequences[i] for i in going_on]
            rows, counts, places = rows[going_on], counts[going_on], places[going_on] + 1
            self._running.accept_draft(sequences, rows)
            self._metrics.num_accepted_forced_tokens += len(going_on)
            offset += 1

    def _append_one(
        self,
        live: LiveRequest,
        sequence: Sequence,
        token_id: int,
        logprobs: LogprobsTensors | None,
        i: int,
    ) -> None:
        completion = live.completions[sequence.index]
        params = live.request.params
        if params.logprobs is not None or params.num_sequences > params.n:
            assert logprobs is not None
            completion.cumulative_logprob += float(logprobs.logprobs[i, 0])
            if completion.logprobs is not None:
                k = params.logprobs or 0
                completion.logprobs.append(self._logprobs.entries(logprobs, i, k))
        if _append_token(sequence, completion, token_id):
            self._running.finish(live, sequence)

    def _begin(self, live: LiveRequest, now: float) -> None:
        """Take note of a request's first token; let samples that waited for it go."""
        live.metrics.first_token_time = now
        for sample in live.deferred:
            live.sequences[sample.index] = sample
            self._running.scheduler.add(sample)
        live.deferred.clear()
        live.quiet = live.quiet_completion()

    def propose(self, sequences: list[Sequence], news: StepNews) -> None:
        """Let the grammars of sequences that go on say what must follow."""
        for sequence in sequences:
            request_id = sequence.request_id
            if sequence.constraint is None or sequence.status is not SequenceStatus.RUNNING:
                continue
            if request_id in news.failed:
                continue
            live = self._requests[request_id]
            try:
                if self.follow_grammar(live, sequence):
                    self._running.finish(live, sequence)
                    news.touched[request_id] = live
            except Exception as error:  # a library's: it concerns this request alone
                news.failed[request_id] = error

    def follow_grammar(self, live: LiveRequest, sequence: Sequence) -> bool:
        """Give a sequence the forced text, or the drafts, that follow; return whether it ends."""
        wanted = live.request.params.structured_outputs
        assert wanted is not None
        if not wanted.canonical_tokens:
            self._constraints.propose(live, sequence)
            return False
        assert sequence.constraint is not None
        completion = live.completions[sequence.index]
        is_last = False
        while not is_last and (forced := sequence.constraint.forced_tokens()):
            before = len(sequence.output_token_ids)
            for token_id in forced:
                is_last = _append_token(sequence, completion, token_id)
                if is_last:
                    break
            new = sequence.output_token_ids[before:]
            self._running.extend(sequence, new)
            self._metrics.num_canonical_tokens += len(new)
            self._metrics.num_generation_tokens += len(new)
        return is_last


def _append_token(sequence: Sequence, completion: Completion, token_id: int) -> bool:
    """Give a sequence its token; return whether it is the last."""
    is_last = completion.append(token_id)
    constraint = sequence.constraint
    # A token that ends a text is no part of it.
    if constraint is not None and completion.finish_reason != "stop":
        constraint.accept([token_id])
        if constraint.is_finished():
            # Whole, even where it has the length that was allowed.
            completion.finish_reason, is_last = "stop", True
    return is_last
