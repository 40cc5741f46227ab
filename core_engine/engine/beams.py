"""The search that a request asks for, and what its result says of each token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.outputs import Logprob, TokenLogprobs
from quire.sampling.beam_search import BeamSearch, Candidates
from quire.tokenizer.detokenizer import Detokenizer

if TYPE_CHECKING:
    from quire.engine.request import Request
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
