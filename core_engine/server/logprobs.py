"""Log-probabilities in the shapes that OpenAI's and vLLM's clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from quire.outputs import Logprob, TokenLogprobs

if TYPE_CHECKING:
    from quire.tokenizer.tokenizer import Tokenizer

_LOWEST: Final = -9999.0
"""Stands for the logarithm of 0, which JSON cannot say."""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST)


def likeliest(entries: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """Return the ``count`` likeliest of a position's tokens, best first; all of them for -1."""
    ranked = [item for item in entries.items() if count < 0 or (item[1].rank or 0) <= count]
    ranked.sort(key=lambda item: item[1].rank or 0)
    return ranked


class CompletionLogprobs:
    """The lists of ``logprobs`` of one choice of ``/v1/completions``, as it grows.

    Parameters
    ----------
    tokenizer : Tokenizer
    count : int
        Of likeliest tokens per position.
    as_ids : bool
        Whether a token is written as its number.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._as_ids = as_ids
        self._settled = 0
        self._stream = tokenizer.stream([])

    def start(self, offset: int, prompt_token_ids: Sequence[int], **options: bool) -> None:
        """Say that text begins here.

        Parameters
        ----------
        offset : int
            Characters before it.
        prompt_token_ids : list of int
            What it continues.
        **options
            How it is made of tokens, as for :meth:`quire.tokenizer.tokenizer.Tokenizer.stream`.
        """
        self._settled = offset
        self._stream = self._tokenizer.stream(prompt_token_ids, **options)

    def shape(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        end: int | None = None,
    ) -> dict[str, Any]:
        """Return the lists for the next tokens.

        Parameters
        ----------
        token_ids : list of int
        entries : list
            One for each; None for a prompt's first token, which nothing predicts.
        end : int, optional
            The length of the text, where it is known: a stop string may have cut it.
        """
        offsets: list[int] = []
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for token_id, found in zip(token_ids, entries, strict=True):
            offset = self._settled + len(self._stream.tentative())
            offsets.append(offset if end is None else min(offset, end))
            self._settled += len(self._stream.feed(token_id))
            if found is None:
                tokens.append(self._text(token_id, None))
                chosen.append(None)
                top.append(None)
                continue
            tokens.append(self._text(token_id, found[token_id]))
            chosen.append(_value(found[token_id]))
            top.append(self._top(token_id, found))
        return {
            "text_offset": offsets,
            "token_logprobs": chosen,
            "tokens": tokens,
            "top_logprobs": top,
        }

    def _top(self, token_id: int, found: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for other, entry in [*likeliest(found, self._count), (token_id, found[token_id])]:
            # Bytes that are no character look the same: the likeliest of them stands for all.
            top.setdefault(self._text(other, entry), _value(entry))
        return top

    def _text(self, token_id: int, entry: Logprob | None) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        text = None if entry is None else entry.decoded_token
        return self._tokenizer.decode_token(token_id) if text is None else text


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the lists of two pieces of a text as those of one."""
    return {name: first[name] + second[name] for name in first}


class ChatLogprobs:
    """The entries of ``logprobs.content`` of a chat.

    Parameters
    ----------
    tokenizer : Tokenizer
    count : int
        Of likeliest tokens per position.
    as_ids : bool
        Whether a token is written as its number.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._as_ids = as_ids
        self._bytes = tokenizer.token_bytes()

    def shape(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return the entries for tokens."""
        content = []
        for token_id, found in zip(token_ids, entries, strict=True):
            content.append(
                {
                    **self._entry(token_id, found[token_id]),
                    "top_logprobs": [
                        self._entry(other, entry) for other, entry in likeliest(found, self._count)
                    ],
                }
            )
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        text = entry.decoded_token
        if text is None:
            text = self._tokenizer.decode_token(token_id)
        known = self._bytes is not None and token_id < len(self._bytes)
        data = self._bytes[token_id] if known and self._bytes is not None else b""
        return {
            "token": f"token_id:{token_id}" if self._as_ids else text,
            "logprob": _value(entry),
            "bytes": list(data or text.encode()),
        }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None] | None, count: int | None
) -> list[dict[str, Any] | None] | None:
    """Return a prompt's log-probabilities as vLLM has them: per token, by token id."""
    if entries is None or count is None:
        return None
    shaped: list[dict[str, Any] | None] = []
    for found in entries:
        if found is None:
            shaped.append(None)
            continue
        token_id = next(iter(found))  # the prompt's own token stands first
        kept = dict([(token_id, found[token_id]), *likeliest(found, count)])
        shaped.append(
            {
                str(other): {
                    "logprob": _value(entry),
                    "rank": entry.rank,
                    "decoded_token": entry.decoded_token,
                }
                for other, entry in kept.items()
            }
        )
    return shaped
