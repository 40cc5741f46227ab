"""Beam searches in an engine: from a request to its sequences, and to what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.outputs import Logprob, TokenLogprobs
from quire.sampling.beam_search import BeamSearch, Candidates
from quire.sampling.row import num_beam_candidates
from quire.tokenizer.detokenizer import Detokenizer

if TYPE_CHECKING:
    from quire.engine.live_request import LiveRequest
    from quire.engine.request import Request
    from quire.engine.running import RunningSequences
    from quire.engine.sequence import Sequence
    from quire.sampling.logprobs import LogprobsTensors
    from quire.tokenizer.tokenizer import Tokenizer


def start_beam_search(
    request: Request, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int]
) -> BeamSearch:
    """Return a fresh search for a request with ``use_beam_search``.

    Parameters
    ----------
    request : Request
    tokenizer : Tokenizer or None
        What stop strings are looked for with.
    eos_token_ids : frozenset of int
        Tokens that end a hypothesis.
    """
    params = request.params
    assert params.max_tokens is not None
    stop_token_ids = frozenset(params.stop_token_ids or ())

    def stopped(token_ids: list[int]) -> str | int | None:
        if token_ids[-1] in stop_token_ids:
            return token_ids[-1]
        return Detokenizer(tokenizer, params, request.prompt_token_ids).append(token_ids)

    return BeamSearch(
        width=params.beam_width,
        num_return=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_tokens=params.max_tokens,
        eos_token_ids=set(eos_token_ids),
        min_tokens=params.min_tokens,
        is_stopped=stopped if params.stop or stop_token_ids else None,
    )


def beam_logprobs(
    source: tuple[int, Candidates], k: int, token_text: Callable[[int], str | None]
) -> TokenLogprobs:
    """Return the logprobs of one token of a hypothesis, and of the ``k`` best in its place.

    Parameters
    ----------
    source : (int, Candidates)
        As in :attr:`quire.sampling.beam_search.Beam.sources`.
    k : int
        -1 for all.
    token_text : callable
        Gives a token's text.
    """
    place, (ids, values) = source
    shown = len(ids) if k < 0 else min(k, len(ids))
    return {
        ids[i]: Logprob(values[i], i + 1, token_text(ids[i]))
        for i in dict.fromkeys((place, *range(shown)))
        if values[i] > -math.inf
    }


def report_candidates(
    live: LiveRequest,
    sequence: Sequence,
    running: RunningSequences,
    logprobs: LogprobsTensors,
    i: int,
) -> None:
    """Note a beam's best continuations, row ``i``; it rests until the search goes on."""
    running.table.take_back(sequence)  # the search decides which token it is
    width = num_beam_candidates(live.request.params, live.eos_token_ids)
    live.candidates[sequence.index] = (
        logprobs.token_ids[i, 1 : width + 1].tolist(),
        logprobs.logprobs[i, 1 : width + 1].tolist(),
    )
    running.scheduler.park(sequence)


def advance_beams(
    live: LiveRequest, running: RunningSequences, token_text: Callable[[int], str | None]
) -> None:
    """Let a search go on, once all its beams have reported.

    Every beam takes its next token: in place where it can, by a new sequence else, which finds
    its parent's full blocks in the prefix cache, like any other.
    """
    assert live.beam is not None
    if len(live.candidates) < len(live.beam_order):
        return
    parents = [live.sequences[index] for index in live.beam_order]
    moves = live.beam.advance([live.candidates[index] for index in live.beam_order])
    live.candidates.clear()
    live.beam_order = []
    going_on: dict[int, int] = {}
    forks: list[Sequence] = []
    # Forks first: they copy their parent's tokens as they were.
    for place, token_id in moves:
        parent = parents[place]
        if parent.index in going_on:
            forks.append(parent.fork(live.num_sequences, token_id))
            live.beam_order.append(live.num_sequences)
            live.num_sequences += 1
        else:
            going_on[parent.index] = token_id
            live.beam_order.append(parent.index)
    for index, token_id in going_on.items():
        running.continue_beam(live.sequences[index], token_id)
    for parent in parents:
        if parent.index not in going_on:
            running.finish(live, parent)
    for child in forks:
        live.sequences[child.index] = child
        running.scheduler.add(child)
    if live.beam.done:
        _finish_beams(live, running, token_text)


def _finish_beams(
    live: LiveRequest, running: RunningSequences, token_text: Callable[[int], str | None]
) -> None:
    assert live.beam is not None
    for sequence in list(live.sequences.values()):
        running.finish(live, sequence)
    for rank, hypothesis in enumerate(live.beam.results()):
        completion = live.start_completion(rank, [])
        for token_id in hypothesis.token_ids:
            completion.append(token_id)
        completion.cumulative_logprob = hypothesis.cum_logprob
        completion.finish_reason = hypothesis.finish_reason
        completion.stop_reason = hypothesis.stop_reason
        if completion.logprobs is not None:
            completion.logprobs.extend(
                beam_logprobs(source, live.request.params.logprobs or 0, token_text)
                for source in hypothesis.sources
            )
