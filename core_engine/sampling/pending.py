"""PendingTokens: what a step's rows are given, before the host knows of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import InvalidRequestError, QuireError
from quire.sampling.logprobs import LogprobsTensors
from quire.utils.transfers import Download


@dataclass(slots=True)
class SamplerOutput:
    """What a step's rows were given.

    Attributes
    ----------
    token_ids : ndarray[num_rows], int64
        0 for a row that failed.
    logprobs : LogprobsTensors or None
        None when no row asked. k is the largest number asked for; a row that asked for fewer
        uses its first columns. A row that does beam search finds its best continuations here,
        with the log-probabilities that the search is to add up.
    failures : dict of int to BaseException
        Why the request of a row, by its place in the batch, cannot go on. Other rows are as
        they would have been without it.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: LogprobsTensors | None = None
    failures: dict[int, BaseException] = field(default_factory=dict)


class PendingTokens:
    """The tokens of a step that a device was told to choose.

    Parameters
    ----------
    token_ids : Tensor[num_rows], int64
        Some token of the vocabulary for a row that fails.
    highest : Tensor[num_rows], float32
        Each row's highest logit as the model gave it; NaN where any of the row's is.
    chosen_from : Tensor[num_rows], float32, optional
        The highest logit of those that were chosen from, where it may be another.
    logprobs : LogprobsTensors, optional

    Attributes
    ----------
    token_ids : Tensor[num_rows], int64
        On the device, to go on with there.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        highest: torch.Tensor,
        chosen_from: torch.Tensor | None = None,
        logprobs: LogprobsTensors | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._is_edited = chosen_from is not None
        self._has_logprobs = logprobs is not None
        parts = [token_ids, highest]
        if chosen_from is not None:
            parts.append(chosen_from)
        if logprobs is not None:
            parts += [logprobs.token_ids, logprobs.logprobs, logprobs.ranks]
        self._download = Download(parts)

    @classmethod
    def of_likeliest(cls, token_ids: torch.Tensor, highest: torch.Tensor) -> PendingTokens:
        """Return the tokens of rows that need no more than the likeliest.

        Parameters
        ----------
        token_ids : Tensor[num_rows], int64
            The likeliest tokens.
        highest : Tensor[num_rows], float32
            Their logits; NaN where any of the row's is.
        """
        return cls(token_ids, highest)

    def collect(self) -> SamplerOutput:
        """Wait for the tokens, and return them."""
        token_ids, highest, *more = self._download.wait()
        chosen_from = more[0].numpy() if self._is_edited else None
        logprobs = LogprobsTensors(*more[-3:]) if self._has_logprobs else None
        return outcome(token_ids.numpy(), highest.numpy(), chosen_from, logprobs)


def outcome(
    token_ids: npt.NDArray[np.int64],
    highest: npt.NDArray[np.float32],
    chosen_from: npt.NDArray[np.float32] | None = None,
    logprobs: LogprobsTensors | None = None,
) -> SamplerOutput:
    """Return what rows were given, once the host has it; see `PendingTokens`."""
    failures: dict[int, BaseException] = {}
    if chosen_from is None:
        chosen_from = highest
    finite = np.isfinite(chosen_from)
    if not finite.all():
        for place in np.flatnonzero(~finite).tolist():
            if not math.isfinite(highest[place]):
                failures[place] = model_error(float(highest[place]))
            elif chosen_from[place] != np.inf:
                failures[place] = nothing_allowed()
        token_ids = token_ids.copy()  # what the device goes on with may share its memory
        token_ids[list(failures)] = 0
    return SamplerOutput(token_ids, logprobs, failures)


def model_error(highest: float) -> QuireError:
    """Return the error of a row whose highest logit, as the model gave it, is not finite."""
    kind = "NaN" if math.isnan(highest) else "infinite"
    return QuireError(f"the model produced {kind} logits")


def nothing_allowed() -> InvalidRequestError:
    """Return the error of a row whose request forbids every token."""
    return InvalidRequestError(
        "no token is allowed: structured_outputs, allowed_token_ids, bad_words, "
        "min_tokens, logit_bias and logits_processors together leave none"
    )
