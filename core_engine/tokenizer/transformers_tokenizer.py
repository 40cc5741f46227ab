"""Tokenizers that only transformers can read."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

from quire.errors import TokenizerError
from quire.tokenizer.files import TokenizerFiles
from quire.tokenizer.pieces import TokenPieces
from quire.tokenizer.special_tokens import STANDARD_NAMES, SpecialTokens
from quire.tokenizer.tokenizer import Tokenizer


class TransformersTokenizer(Tokenizer):
    """A tokenizer that transformers runs in Python, behind the names of :class:`Tokenizer`.

    Parameters
    ----------
    wrapped : transformers.PreTrainedTokenizerBase
    special : SpecialTokens
    name_or_path : str
    """

    is_fast = False

    def __init__(self, wrapped: Any, special: SpecialTokens, *, name_or_path: str) -> None:
        self._wrapped = wrapped
        self._special = special
        self.chat_template = getattr(wrapped, "chat_template", None)
        self.clean_up_tokenization_spaces = bool(
            getattr(wrapped, "clean_up_tokenization_spaces", False)
        )
        self.name_or_path = name_or_path
        self.model_max_length = getattr(wrapped, "model_max_length", None)
        self._decoded_tokens: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def _pieces(self) -> TokenPieces | None:
        return None

    @property
    def backend(self) -> Any:
        """The transformers tokenizer that does the work; not to be changed."""
        return self._wrapped

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those that were added to the model's vocabulary."""
        return int(self._wrapped.vocab_size)

    @cached_property
    def _num_ids(self) -> int:
        return max(self.get_vocab().values(), default=-1) + 1

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added tokens included."""
        vocab: dict[str, int] = self._wrapped.get_vocab()
        return vocab

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens."""
        added: dict[str, int] = self._wrapped.get_added_vocab()
        return added

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode tokens that are spelled as the vocabulary does."""
        return str(self._wrapped.convert_tokens_to_string(tokens))

    def _id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self):
            return None
        token: str | None = self._wrapped.convert_ids_to_tokens(token_id)
        return token

    def _token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Written in Python, it keeps caches that several threads must not change at once.
        with self._lock:
            ids = self._wrapped.encode(text, add_special_tokens=add_special_tokens)
        return [int(id_) for id_ in ids]

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of token ids; see :meth:`Tokenizer.decode`."""
        row = [ids] if isinstance(ids, int) else [int(id_) for id_ in ids]
        known = [id_ for id_ in row if 0 <= id_ < len(self)]
        with self._lock:
            return str(
                self._wrapped.decode(
                    known,
                    skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                    spaces_between_special_tokens=spaces_between_special_tokens,
                )
            )

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.decode(ids, skip_special_tokens)

    def to_transformers(self) -> Any:
        """Return the transformers tokenizer itself."""
        return self._wrapped


def load_with_transformers(files: TokenizerFiles, *, is_asked_for: bool) -> Tokenizer:
    """Load a tokenizer by ``AutoTokenizer``, without running code of the checkpoint.

    Parameters
    ----------
    files : TokenizerFiles
    is_asked_for : bool
        Whether the user asked for transformers by ``tokenizer_mode="slow"``.

    Raises
    ------
    TokenizerError
        If transformers cannot read it either.
    """
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(
            str(files.folder), use_fast=not is_asked_for, trust_remote_code=False
        )
    except Exception as error:
        raise TokenizerError(
            f"{files.folder} holds no tokenizer that quire or transformers can read: {error}"
        ) from error
    named = {name: str(token) for name, token in wrapped.special_tokens_map.items()}
    ordered = {name: named[name] for name in (*STANDARD_NAMES, *named) if name in named}
    extra = tuple(str(token) for token in getattr(wrapped, "extra_special_tokens", None) or ())
    special = SpecialTokens(ordered, extra)
    backend = getattr(wrapped, "backend_tokenizer", None)
    if backend is None:
        return TransformersTokenizer(wrapped, special, name_or_path=str(files.folder))
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        backend,
        special,
        chat_template=wrapped.chat_template,
        clean_up_tokenization_spaces=bool(wrapped.clean_up_tokenization_spaces),
        name_or_path=str(files.folder),
        model_max_length=wrapped.model_max_length,
    )
