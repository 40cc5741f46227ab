"""TokenCounts: which tokens a sequence has, kept up to date as it grows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """The distinct tokens of one sequence and how often each was generated.

    Only tokens that occur are stored, so a sequence costs what its length does and not what
    the vocabulary does, and a new token costs the same however long the sequence is.

    Parameters
    ----------
    prompt_token_ids : iterable of int
        Tokens that count as present but not as generated.
    """

    def __init__(self, prompt_token_ids: Iterable[int] = ()) -> None:
        distinct = dict.fromkeys(prompt_token_ids)
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        size = max(16, 2 * len(distinct))
        self._token_ids = np.zeros(size, dtype=np.int64)
        self._counts = np.zeros(size, dtype=np.float32)
        self._token_ids[: len(distinct)] = list(distinct)
        self.num_counted = 0
        """Generated tokens that have been counted."""

    def extend(self, token_ids: Iterable[int]) -> None:
        """Count tokens that were generated."""
        for token_id in token_ids:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._token_ids):
                self._token_ids = np.resize(self._token_ids, 2 * place)
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._token_ids[place] = token_id
            self._counts[place] += 1
            self.num_counted += 1

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The distinct tokens, `[num_distinct]`; a view that the next `extend` may change."""
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of them was generated, `[num_distinct]`; likewise a view."""
        return self._counts[: len(self._places)]
