"""The text of a completion while it is generated, and the stop strings that end it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.tokenizer.streams import TextStream

if TYPE_CHECKING:
    from quire.sampling_params import SamplingParams
    from quire.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Turn the tokens of one completion into text as they come.

    The text is that of the whole completion decoded behind its prompt: the leading space of a
    sentencepiece token is kept where the prompt has text before it. While the completion runs,
    neither half a character nor what may become a stop string is shown, so what was shown is
    never taken back. A token costs constant time, however long the text is.

    A stop string counts once it is complete: of several, the one that ends first in the text
    wins, and of those that end together the longest. It may be spread over any number of
    tokens, and must end behind the text of the first ``min_tokens`` tokens.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None gives no text at all.
    params : SamplingParams
    prompt_token_ids : list of int
    """

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: list[int]
    ) -> None:
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = tokenizer.stream(
                prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        self._stops = list(dict.fromkeys(stops)) if self._stream is not None else []
        self._longest_stop = max(map(len, self._stops), default=0)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._parts: list[str] = []
        self._length = 0
        self._tail = ""
        self._floor = 0
        self._num_taken = 0
        self._is_closed = False
        self.num_tokens_used = 0
        """Tokens that were read, the one that completed a stop string included."""

    def append(self, token_ids: list[int]) -> str | None:
        """Read generated tokens.

        Parameters
        ----------
        token_ids : list of int
            In order; those behind the completion of a stop string are left unread.

        Returns
        -------
        str or None
            The stop string that was completed. The text is then cut before it, or behind it
            with ``include_stop_str_in_output``.
        """
        stream = self._stream
        if self._is_closed:
            return None
        if stream is None or not self._stops:
            self.num_tokens_used += len(token_ids)
            if stream is not None:
                settled = "".join(map(stream.feed, token_ids))
                if settled:
                    self._parts.append(settled)
                    self._length += len(settled)
            return None
        for token_id in token_ids:
            self.num_tokens_used += 1
            settled = stream.feed(token_id)
            if settled:
                self._parts.append(settled)
                self._length += len(settled)
            found = self._search(settled, stream.tentative())
            if found is not None:
                return found
        return None

    @property
    def looks_for_stops(self) -> bool:
        """Whether a token must be read at once, since a stop string may end in it."""
        return bool(self._stops)

    def _search(self, settled: str, tentative: str) -> str | None:
        """Look for stop strings that end in new text, and cut the text at the first."""
        window = self._tail + settled + tentative
        start = self._length - len(settled) - len(self._tail)
        if self.num_tokens_used <= self._min_tokens:
            self._floor = self._length + len(tentative)
        else:
            first_end = max(len(self._tail), self._floor - start) + 1
            best: tuple[int, int] | None = None
            for stop in self._stops:
                position = window.find(stop, max(0, first_end - len(stop)))
                if position >= 0:
                    match = (position + len(stop), -len(stop))
                    best = match if best is None else min(best, match)
            if best is not None:
                end, negative_length = best
                stop = window[end + negative_length : end]
                self._cut(start + end - (0 if self._includes_stop else len(stop)), tentative)
                return stop
        keep = self._longest_stop - 1
        self._tail = (self._tail + settled)[-keep:] if keep else ""
        return None

    def _cut(self, length: int, tentative: str) -> None:
        self._parts.append(tentative)
        text = "".join(self._parts)[:length]
        self._parts = [text]
        self._length = len(text)
        self._is_closed = True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the start of a stop string."""
        tail = self._tail
        if not tail:
            return 0
        longest = 0
        for stop in self._stops:
            position = tail.find(stop[0], max(0, len(tail) - len(stop) + 1))
            while position >= 0:
                if stop.startswith(tail[position:]):
                    longest = max(longest, len(tail) - position)
                    break
                position = tail.find(stop[0], position + 1)
        return longest

    def _visible_length(self) -> int:
        if self._is_closed or not self._stops or self._includes_stop:
            return self._length
        return self._length - self._held_back()

    def text(self, *, finished: bool) -> str:
        """Return the text.

        Parameters
        ----------
        finished : bool
            Whether no token follows. Otherwise an incomplete character and the possible start
            of a stop string are held back.
        """
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        text = self._parts[0] if self._parts else ""
        if finished:
            return text if self._is_closed or self._stream is None else text + self._stream.rest()
        return text[: self._visible_length()]

    def take(self, *, finished: bool) -> str:
        """Return the text that may be shown and was not taken yet.

        Parameters
        ----------
        finished : bool
            As for :meth:`text`. What was taken, put together, is :meth:`text`.
        """
        if finished and not self._is_closed and self._stream is not None:
            rest = self._stream.rest()
            self._parts.append(rest)
            self._length += len(rest)
            self._is_closed = True
        stop = self._length if finished else self._visible_length()
        new = self._between(self._num_taken, stop)
        self._num_taken = max(self._num_taken, stop)
        return new

    def _between(self, start: int, stop: int) -> str:
        """Return ``text[start:stop]`` in time that depends on its length alone."""
        if stop <= start:
            return ""
        if stop == self._length and start == stop - len(self._parts[-1]):
            return self._parts[-1]
        kept = []
        position = self._length
        for part in reversed(self._parts):
            kept.append(part)
            position -= len(part)
            if position <= start:
                break
        kept.reverse()
        return "".join(kept)[start - position : stop - position]
