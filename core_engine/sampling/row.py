"""Row: what one sequence asks of its logits beyond temperature, top_k, top_p and min_p."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from quire.sampling.penalties import TokenCounts
from quire.sampling.processors import LogitsProcessors
from quire.sampling_params import SamplingParams

_LARGEST_BIAS = 1e30

_NO_IDS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


class Row:
    """The masks, biases, penalties and processors of one sequence.

    Parameters
    ----------
    params : SamplingParams
    prompt_token_ids : list of int
    output_token_ids : list of int
        The sequence's own list, which grows as it does.
    eos_token_ids : collection of int
    bad_words_ids : sequence of list of int
        Token sequences that must not be completed.

    Attributes
    ----------
    allowed : ndarray or None
        The only token ids that may be chosen.
    bias_ids, bias_values : ndarray
        ``logit_bias``, split up.
    processors : LogitsProcessors or None
    counts : TokenCounts or None
        Where a penalty is used.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        eos_token_ids: Collection[int],
        bad_words_ids: Sequence[list[int]],
    ) -> None:
        self.params = params
        self.output_token_ids = output_token_ids
        self.allowed = _ids(params.allowed_token_ids) if params.allowed_token_ids else None
        biases = params.logit_bias or {}
        self.bias_ids = _ids(biases)
        values = np.fromiter(biases.values(), dtype=np.float64)
        # A finite bias stays finite in float32, and leaves room for what is added to it.
        finite = np.clip(values, -_LARGEST_BIAS, _LARGEST_BIAS)
        self.bias_values = np.where(np.isneginf(values), values, finite).astype(np.float32)
        self._end_ids = _ids({*eos_token_ids, *(params.stop_token_ids or ())})
        self._bad_tokens = _ids({words[0] for words in bad_words_ids if len(words) == 1})
        self._bad_phrases = [tuple(words) for words in bad_words_ids if len(words) > 1]
        self.processors = None
        if params.logits_processors:
            self.processors = LogitsProcessors(params.logits_processors, prompt_token_ids)
        self.counts = None
        if params.repetition_penalty != 1.0:
            self.counts = TokenCounts(prompt_token_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts()

    @property
    def is_plain(self) -> bool:
        """Whether the logits are left as they are, now and later."""
        return (
            self.allowed is None
            and not len(self.bias_ids)
            and not (self.params.min_tokens and len(self._end_ids))
            and not len(self._bad_tokens)
            and not self._bad_phrases
            and self.processors is None
            and self.counts is None
        )

    def forbidden(self) -> npt.NDArray[np.int64]:
        """Return the tokens that min_tokens and bad_words rule out next, possibly repeated."""
        output = self.output_token_ids
        parts = [self._bad_tokens] if len(self._bad_tokens) else []
        if len(output) < self.params.min_tokens:
            parts.append(self._end_ids)
        lasts = [
            phrase[-1]
            for phrase in self._bad_phrases
            if tuple(output[-len(phrase) + 1 :]) == phrase[:-1]
        ]
        if lasts:
            parts.append(_ids(lasts))
        return np.concatenate(parts) if parts else _NO_IDS

    def update_counts(self) -> TokenCounts:
        """Return the token counts, the tokens appended since the last call included."""
        assert self.counts is not None
        self.counts.extend(self.output_token_ids[self.counts.num_counted :])
        return self.counts


def _ids(token_ids: Collection[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))


def num_beam_candidates(params: SamplingParams, eos_token_ids: Collection[int]) -> int:
    """Return how many continuations of each beam a beam search has to see.

    Those that end there go no further; as many as there are beams must be left to go on. The
    ``logprobs`` asked for are among them; -1, for all, gives more than any vocabulary has.
    """
    ends = {*eos_token_ids, *(params.stop_token_ids or ())}
    shown = params.logprobs or 0
    return max(params.beam_width + max(params.beam_width, len(ends)), shown % (1 << 31))
