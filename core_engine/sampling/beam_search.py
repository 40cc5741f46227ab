"""BeamSearch: which hypotheses of a beam search go on, and which are its result.

The rules are those of transformers' ``generate(num_beams=...)``, so that both find the same
sequences: candidates of all beams compete by cumulative log-probability; of the best ``width``
of them, those that end enter the list of results, where they compete by cumulative
log-probability / length ** length_penalty (Wu et al., "Google's Neural Machine Translation
System", 2016, with their penalty simplified; the prompt's length does not count); the best
``width`` of those that do not end are the beams of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from quire.errors import InvalidRequestError

Candidates = tuple[list[int], list[float]]
"""Token ids and their log-probabilities, best first."""


@dataclass(slots=True)
class Beam:
    """One hypothesis.

    Attributes
    ----------
    token_ids : list of int
        Generated tokens, with the one that ended it.
    cum_logprob : float
        Sum of their log-probabilities.
    logprobs : list of float
        Of each of them.
    sources : list of (int, Candidates)
        For each token its place among the continuations it was chosen from, and these.
    finish_reason : {"stop", "length"} or None
        None while it may go on.
    stop_reason : int, str or None
        What ``is_stopped`` returned; None for an end-of-sequence token.
    """

    token_ids: list[int] = field(default_factory=list)
    cum_logprob: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    sources: list[tuple[int, Candidates]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def score(self, length_penalty: float) -> float:
        """Return what hypotheses of unequal length are compared by."""
        return _score(self.cum_logprob, len(self.token_ids), length_penalty)

    def extended(self, place: int, candidates: Candidates) -> Beam:
        """Return the hypothesis continued by the candidate at ``place``."""
        token_id, logprob = candidates[0][place], candidates[1][place]
        return Beam(
            [*self.token_ids, token_id],
            self.cum_logprob + logprob,
            [*self.logprobs, logprob],
            [*self.sources, (place, candidates)],
        )


class BeamSearch:
    """The state of one request's beam search; it knows of no tensors and no model.

    Parameters
    ----------
    width : int
        Beams that go on at each step, at most.
    num_return : int
        Hypotheses wanted in the end, at most ``width``.
    length_penalty : float
    early_stopping : bool or "never"
        True ends the search with the ``width``-th result; False when the best beam, ended where
        it is, would not be one; "never" when no continuation of it could be.
    max_tokens : int
        A hypothesis of this length ends.
    eos_token_ids : set of int
        Tokens that end a hypothesis; empty to ignore them.
    min_tokens : int, default 0
        No hypothesis shorter than this ends, but by ``max_tokens``.
    is_stopped : callable, optional
        Called with the generated token ids; returns the stop token or stop string that ends
        them, or None.

    Attributes
    ----------
    live : list of Beam
        The beams to be continued, best first; at the start, the empty one.
    done : bool
    """

    def __init__(
        self,
        *,
        width: int,
        num_return: int,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        max_tokens: int,
        eos_token_ids: Collection[int],
        min_tokens: int = 0,
        is_stopped: Callable[[list[int]], str | int | None] | None = None,
    ) -> None:
        self.live = [Beam()]
        self.done = False
        self._width = width
        self._num_return = num_return
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._is_stopped = is_stopped
        self._finished: list[Beam] = []

    def advance(self, candidates: list[Candidates]) -> list[tuple[int, int]]:
        """Continue every live beam by one token.

        Parameters
        ----------
        candidates : list of (list of int, list of float)
            For each live beam its best continuations, best first: at least ``width`` plus the
            number of tokens that may end it, or all that the vocabulary has. Those of
            log-probability -inf are passed over.

        Returns
        -------
        list of (int, int)
            For each new live beam the index of the beam before that it continues, and its new
            token. Empty once the search is done.

        Raises
        ------
        InvalidRequestError
            No beam has a possible continuation and nothing was found before.
        """
        ranked = sorted(
            (-beam.cum_logprob - logprob, parent, place)
            for parent, (beam, (_, logprobs)) in enumerate(zip(self.live, candidates, strict=True))
            for place, logprob in enumerate(logprobs)
            if logprob > -math.inf
        )
        going: list[Beam] = []
        origins: list[tuple[int, int]] = []
        ended: list[Beam] = []
        for rank, (_, parent, place) in enumerate(ranked):
            if rank >= self._width and len(going) == self._width:
                break
            beam = self.live[parent].extended(place, candidates[parent])
            if self._ends(beam):
                if rank < self._width:
                    ended.append(beam)
            elif len(going) < self._width:
                going.append(beam)
                origins.append((parent, beam.token_ids[-1]))
        self._finished = sorted(
            [*self._finished, *ended], key=lambda beam: -beam.score(self._length_penalty)
        )[: self._width]
        if not going and not self._finished:
            raise InvalidRequestError(
                "no token is allowed: masks and processors leave no beam a continuation"
            )
        self.live = going
        self.done = not going or not self._can_improve()
        return [] if self.done else origins

    def results(self) -> list[Beam]:
        """Return the hypotheses found, best first: ``num_return``, or fewer if there are no more.

        Before the search is done, live beams make up the number.
        """
        live = [] if self.done else self.live
        return list(islice((*self._finished, *live), self._num_return))

    def _ends(self, beam: Beam) -> bool:
        """Whether a new hypothesis goes no further; its reasons are set if so."""
        length = len(beam.token_ids)
        if length >= self._min_tokens:
            if beam.token_ids[-1] in self._eos_token_ids:
                beam.finish_reason = "stop"
            elif self._is_stopped is not None:
                beam.stop_reason = self._is_stopped(beam.token_ids)
                beam.finish_reason = None if beam.stop_reason is None else "stop"
        if beam.finish_reason is None and length >= self._max_tokens:
            beam.finish_reason = "length"
        return beam.finish_reason is not None

    def _can_improve(self) -> bool:
        """Whether going on may change the results."""
        if len(self._finished) < self._width:
            return True
        if self._early_stopping is True:
            return False
        best = self.live[0]
        length = len(best.token_ids)
        if self._early_stopping == "never" and self._length_penalty > 0.0:
            length = self._max_tokens
        reachable = _score(best.cum_logprob, length, self._length_penalty)
        return reachable > self._finished[-1].score(self._length_penalty)


def _score(cum_logprob: float, length: int, length_penalty: float) -> float:
    return cum_logprob / math.pow(length, length_penalty)
