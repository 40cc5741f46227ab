"""Completion: what one sequence has said so far, and whether it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.outputs import CompletionOutput, TokenLogprobs
from quire.tokenizer.detokenizer import Detokenizer

if TYPE_CHECKING:
    from quire.engine.request import Request
    from quire.tokenizer.tokenizer import Tokenizer


_MOST_UNREAD = 64
"""Tokens that wait to be made text of."""


class Completion:
    """The output side of a sequence: text, logprobs, the reason to stop.

    Parameters
    ----------
    request : Request
    index : int
        Its number within the request.
    token_ids : list of int
        The sequence's output tokens; :meth:`append` extends this very list.
    tokenizer : Tokenizer or None
    eos_token_ids : frozenset of int
        Tokens that end the text.
    """

    __slots__ = (
        "_detokenizer",
        "_ends",
        "_eos",
        "_max_tokens",
        "_num_read",
        "_params",
        "_request",
        "_sent_finish",
        "_sent_tokens",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        token_ids: list[int],
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        params = request.params
        assert params.max_tokens is not None
        self._max_tokens = params.max_tokens
        self.index = index
        self.token_ids = token_ids
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._request = request
        self._params = params
        self._eos = eos_token_ids
        self._ends = eos_token_ids.union(params.stop_token_ids or ())
        self._detokenizer = Detokenizer(tokenizer, params, request.prompt_token_ids)
        self._num_read = 0
        self._sent_tokens = 0
        self._sent_finish = False

    def append(self, token_id: int) -> bool:
        """Take the next token; return whether it is the last.

        Text is made of it when it is asked for, now where a stop string may end in it, and before
        so much is unread that others would wait for it.
        """
        token_ids = self.token_ids
        token_ids.append(token_id)
        if token_id in self._ends:
            self.finish_reason = "stop"
            if token_id not in self._eos:
                self.stop_reason = token_id
        elif self._detokenizer.looks_for_stops or len(token_ids) - self._num_read >= _MOST_UNREAD:
            stop = self._read()
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
        if self.finish_reason is None and len(token_ids) >= self._max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def _read(self) -> str | None:
        """Make text of the tokens that were not read yet, but for one that ends the text."""
        end = len(self.token_ids)
        if end and self.token_ids[-1] in self._ends and not self._params.include_stop_str_in_output:
            end -= 1
        if end <= self._num_read:
            return None
        unread = self.token_ids[self._num_read : end]
        self._num_read = end
        return self._detokenizer.append(unread)

    @property
    def is_whole(self) -> bool:
        """Whether it ended of itself, and not half-way by a stop string or its length."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)

    def text_token_ids(self) -> list[int]:
        """Return its tokens without one that ends the text."""
        ends = bool(self.token_ids) and self.token_ids[-1] in self._ends
        return self.token_ids[:-1] if ends else list(self.token_ids)

    def has_news(self) -> bool:
        """Return whether anything happened since the last delta."""
        finished = self.finish_reason is not None
        return self._sent_tokens < len(self.token_ids) or finished is not self._sent_finish

    def output(self) -> CompletionOutput:
        """Return all of it."""
        self._read()
        text = self._detokenizer.text(finished=self.finish_reason is not None)
        return self._output(text, list(self.token_ids), self.logprobs)

    def delta(self) -> CompletionOutput:
        """Return what is new since the last call."""
        finished = self.finish_reason is not None
        first = self._sent_tokens
        self._read()
        output = self._output(
            self._detokenizer.take(finished=finished),
            self.token_ids[first:],
            None if self.logprobs is None else self.logprobs[first:],
        )
        self._sent_tokens, self._sent_finish = len(self.token_ids), finished
        return output

    def _output(
        self, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            lora_request=self._request.lora_request,
        )
