"""Vocabulary: a model's tokens as the bytes that they add to a text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.tokenizer.tokenizer import Tokenizer


class Vocabulary:
    """What constraint libraries have to know of a tokenizer and its model.

    The model may have more tokens than the tokenizer, or fewer: there are as many here as the
    model has, and those that the tokenizer does not know add nothing, so that no constraint
    allows them. One more id, the model's first that does not exist, stands for the end of the
    text: libraries want such a token, while a model may have several or none.

    Parameters
    ----------
    tokenizer : Tokenizer or None
    vocab_size : int
        Tokens of the model.

    Attributes
    ----------
    tokens : list of bytes
        ``[vocab_size + 1]``; empty for special tokens and unknown ones.
    special_tokens : dict of int to str
        Contents of the special tokens, by id.
    end_id : int
        The id that stands for the end.

    Raises
    ------
    InvalidRequestError
        There is no tokenizer, or its tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        if tokenizer is None:
            raise InvalidRequestError(
                "structured_outputs must be None: it needs a tokenizer, and this engine has none "
                "(skip_tokenizer_init=True)"
            )
        known = tokenizer.token_bytes()
        if known is None:
            raise InvalidRequestError(
                "structured_outputs must be None with this model: its tokenizer's texts do not "
                "follow token by token, so that no token can be held against a grammar"
            )
        self._tokenizer = tokenizer
        self.end_id = vocab_size
        special = tokenizer.special_texts().items()
        self.special_tokens = {id_: text for id_, text in special if id_ < vocab_size}
        self.tokens = known[:vocab_size]
        self.tokens += [b""] * (vocab_size + 1 - len(self.tokens))
        for id_ in self.special_tokens:
            self.tokens[id_] = b""

    @property
    def num_words(self) -> int:
        """Words of 32 bits that a mask has."""
        return (len(self.tokens) + 31) // 32

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens that the model knows this text by, within a text.

        A tokenizer may normalize what it reads, or read a special token out of it: from there on
        these are the longest tokens that spell the text, which has to come as it is.
        """
        spelled, end = text.encode(), 0
        ids: list[int] = []
        for id_ in self._tokenizer.encode_fragment(text):
            piece = self.tokens[id_] if id_ < self.end_id else b""
            if not piece or not spelled.startswith(piece, end):
                break
            ids.append(id_)
            end += len(piece)
        return ids + self._longest_tokens(spelled[end:])

    def _longest_tokens(self, spelled: bytes) -> list[int]:
        """Return tokens for as much of some bytes as there are tokens for."""
        ids: list[int] = []
        while spelled:
            lengths = range(min(self._longest, len(spelled)), 0, -1)
            length = next((n for n in lengths if spelled[:n] in self._ids), 0)
            if not length:
                break
            ids.append(self._ids[spelled[:length]])
            spelled = spelled[length:]
        return ids

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: id_ for id_, token in enumerate(self.tokens) if token}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)
