"""Text to token ids and back, and conversations to prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from quire.errors import InvalidRequestError
from quire.tokenizer.pieces import DecodeKind, TokenPieces
from quire.tokenizer.special_tokens import SpecialTokens
from quire.tokenizer.streams import TextStream, open_stream, read_all

if TYPE_CHECKING:
    import tokenizers

_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_FRAGMENT_ANCHOR = "\n"


def clean_up_spaces(text: str) -> str:
    """Take out the spaces that word-piece decoders leave before punctuation and contractions."""
    for written, wanted in _CLEAN_UPS:
        text = text.replace(written, wanted)
    return text


class Tokenizer:
    """A model's tokenizer, with the names that users of Hugging Face tokenizers know.

    Encoding and decoding are the ``tokenizers`` library's, by the rules that the checkpoint's
    files state. An instance may be used by several threads at once.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Without truncation and padding.
    special : SpecialTokens
        Names and contents of the special tokens.
    chat_template : str or mapping of str to str, optional
        The template, or several by name.
    clean_up_tokenization_spaces : bool, default False
        Whether decoded text is cleaned up; never done for BPE, which it would damage.
    name_or_path : str, default ""
        Where it was loaded from.
    model_max_length : int, optional
        The longest input that the tokenizer's makers had in mind, in tokens.
    """

    is_fast = True

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        clean_up_tokenization_spaces: bool = False,
        name_or_path: str = "",
        model_max_length: int | None = None,
    ) -> None:
        self._backend = backend
        self._special = special
        self.chat_template = chat_template
        is_bpe = type(backend.model).__name__ == "BPE"
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces and not is_bpe
        self.name_or_path = name_or_path
        self.model_max_length = model_max_length
        self._decoded_tokens: dict[int, str] = {}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name_or_path!r}, {len(self)} tokens, "
            f"special={self._special.named})"
        )

    @cached_property
    def _pieces(self) -> TokenPieces | None:
        return TokenPieces(self._backend, cleans_up=self.clean_up_tokenization_spaces)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The ``tokenizers`` object that does the work; not to be changed."""
        return self._backend

    # The vocabulary

    @cached_property
    def _num_ids(self) -> int:
        # As many ids as tokens, with no gap, is the rule, and asking so is faster than listing.
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        if None not in map(self._backend.id_to_token, range(size)):
            return size
        return max(self.get_vocab().values(), default=-1) + 1

    def __len__(self) -> int:
        """Return the highest token id, plus one."""
        return self._num_ids

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those that were added to the model's vocabulary."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens, sorted by id."""
        added = self._backend.get_added_tokens_decoder()
        return {added[id_].content: id_ for id_ in sorted(added)}

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str | None: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Iterable[int], skip_special_tokens: bool = ...
    ) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Return the tokens as the vocabulary spells them; None for an id it does not have."""
        if isinstance(ids, int):
            return self._id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._id_to_token(int(id_)) for id_ in ids if id_ not in skipped]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(
        self, tokens: str | list[str] | tuple[str, ...]
    ) -> int | list[int | None] | None:
        """Return the ids of tokens; an unknown token has the id of ``unk_token``, or None."""
        if isinstance(tokens, str):
            found = self._token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Decode tokens that are spelled as the vocabulary does."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    def _id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if 0 <= token_id < len(self) else None

    def _token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    # Special tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, such as ``bos_token``."""
        return dict(self._special.named)

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token, each once, the named ones first."""
        return list(dict.fromkeys([*self._special.named.values(), *self._special.extra]))

    @cached_property
    def _special_ids(self) -> list[int]:
        ids = (self._token_to_id(token) for token in self.all_special_tokens)
        return [id_ for id_ in ids if id_ is not None]

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of :attr:`all_special_tokens`."""
        return list(self._special_ids)

    def _named_id(self, name: str) -> int | None:
        token = self._special.named.get(name)
        return None if token is None else self._token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self._special.named.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._named_id("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self._special.named.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._named_id("eos_token")

    @property
    def pad_token(self) -> str | None:
        """The token that fills up a row."""
        return self._special.named.get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        """Its id."""
        return self._named_id("pad_token")

    @property
    def unk_token(self) -> str | None:
        """The token for what the vocabulary cannot spell."""
        return self._special.named.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """Its id."""
        return self._named_id("unk_token")

    # Text to ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Parameters
        ----------
        text : str
        add_special_tokens : bool, default True
            Whether to add what the tokenizer puts around a text, such as a BOS token.

        Raises
        ------
        InvalidRequestError
            If it is no text, or holds lone surrogates, which no encoding has, or what the
            vocabulary cannot spell.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"text must be a str, got {type(text).__name__}")
        try:
            return self._encode(text, add_special_tokens)
        except (TypeError, UnicodeError):
            # What the library says of it names neither the character nor its position.
            surrogate = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if surrogate is None:
                raise
            raise InvalidRequestError(
                f"the text holds a lone surrogate, {text[surrogate]!r} at position {surrogate}, "
                "which is no character"
            ) from None
        except Exception as error:  # the library raises bare Exception
            raise InvalidRequestError(f"the tokenizer cannot spell the text: {error}") from error

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt: as :meth:`encode`, but with no second BOS token.

        A text that was made by a template may begin with the BOS token's own text.
        """
        token_ids = self.encode(text, add_special_tokens)
        bos = self.bos_token_id
        if (
            add_special_tokens
            and bos is not None
            and token_ids[:2] == [bos, bos]
            and text.startswith(self.bos_token or "")
            and self.encode(text, False)[:2] != [bos, bos]
        ):
            del token_ids[0]
        return token_ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_fragment(self, text: str) -> list[int]:
        """Return the ids that a text has within a text, where no leading space is added to it."""
        anchor = self.encode(_FRAGMENT_ANCHOR, add_special_tokens=False)
        ids = self.encode(_FRAGMENT_ANCHOR + text, add_special_tokens=False)
        if ids[: len(anchor)] == anchor and len(ids) > len(anchor):
            return ids[len(anchor) :]
        return self.encode(text, add_special_tokens=False)

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str | None]:
        """Return the tokens of a text as the vocabulary spells them."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True
    ) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask`` of a text, or of each of several."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [self.encode(item, add_special_tokens) for item in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    # Ids to text

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of token ids.

        Parameters
        ----------
        ids : int or iterable of int
            Ids that the vocabulary does not have give no text.
        skip_special_tokens : bool, default False
        clean_up_tokenization_spaces : bool, optional
            Whether to clean up spaces before punctuation; as the tokenizer says by default.
        spaces_between_special_tokens : bool, default True
            With False, an added token right behind an added token loses the space that the
            decoder writes before it.
        """
        row = [ids] if isinstance(ids, int) else [int(id_) for id_ in ids]
        if not spaces_between_special_tokens and not skip_special_tokens:
            pieces = self._pieces
            if pieces is not None and pieces.kind is DecodeKind.PIECES:
                stream = self.stream(
                    [], skip_special_tokens=False, spaces_between_special_tokens=False
                )
                return read_all(stream, row)
        text = self._decode(row, skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        elif type(self._backend.model).__name__ == "BPE":
            clean_up_tokenization_spaces = False
        return clean_up_spaces(text) if clean_up_tokenization_spaces else text

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        known = [id_ for id_ in ids if 0 <= id_ < len(self)]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each of several sequences of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token within a text.

        A leading space is kept, special tokens are spelled out, and bytes that are no
        character of their own show as U+FFFD. Never fails: an unknown id gives "".
        """
        found = self._decoded_tokens.get(token_id)
        if found is None:
            found = self._decoded_tokens[token_id] = self._decode_token(token_id)
        return found

    def _decode_token(self, token_id: int) -> str:
        if not 0 <= token_id < len(self):
            return ""
        pieces = self._pieces
        if pieces is None:
            return self._decode([token_id], False)
        if pieces.token_kind is DecodeKind.BYTES:
            return pieces.bytes_of(token_id).decode("utf-8", errors="replace")
        if pieces.token_kind is DecodeKind.PIECES:
            text = pieces.text_of(token_id)
            if isinstance(text, int):
                return bytes([text]).decode("utf-8", errors="replace")
            return "" if text is None else text[1]
        return self._decode([token_id], False)

    def token_bytes(self) -> list[bytes] | None:
        """Return what each token id adds to a text that others have begun, in UTF-8.

        Special tokens add nothing. None where no such rule is known of this tokenizer.
        """
        return None if self._pieces is None else self._pieces.all_bytes(len(self))

    def special_texts(self) -> dict[int, str]:
        """Return the special tokens by id: those with a role, and all others that are no text."""
        found = set(self._special_ids)
        if self._pieces is not None:
            found |= self._pieces.special_ids
        texts = {id_: self._id_to_token(id_) for id_ in sorted(found)}
        return {id_: text for id_, text in texts.items() if text is not None}

    def stream(
        self,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> TextStream:
        """Return a stream that turns tokens behind a prompt into text, one by one.

        Parameters
        ----------
        prompt_token_ids : sequence of int
            What the text continues; may be empty.
        skip_special_tokens, spaces_between_special_tokens : bool
            As for :meth:`decode`.
        """

        def decode(ids: list[int]) -> str:
            return self.decode(
                ids,
                skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )

        return open_stream(
            self._pieces,
            decode,
            skip_special_tokens=skip_special_tokens,
            join_added_tokens=not spaces_between_special_tokens and not skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )

    # Conversations

    def apply_chat_template(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> str | list[int]:
        """Write a conversation as the prompt that the model was tuned on.

        Parameters
        ----------
        messages : list of dict
            Each with ``role`` and ``content``.
        chat_template : str, optional
            A Jinja template, or the name of one of the tokenizer's.
        tools : list, optional
            JSON schemas, or functions to be described by one.
        documents : list of dict, optional
        add_generation_prompt : bool, default True
            Whether to end with the header of the assistant's answer.
        continue_final_message : bool or str, default False
            Whether to leave the final message open, to be continued.
        tokenize : bool, default False
            Whether to return token ids; special tokens are those that the template writes.
        **kwargs
            Further variables of the template.

        Raises
        ------
        InvalidRequestError
            If there is no template, or it fails on these messages.
        """
        from quire.tokenizer.chat_template import choose_template, render

        template = choose_template(self.chat_template, chat_template, has_tools=tools is not None)
        text = render(
            template,
            messages,
            special_tokens=self._special.named,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=kwargs,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def to_transformers(self) -> Any:
        """Return a ``transformers`` tokenizer that works the same; imports transformers."""
        from transformers import PreTrainedTokenizerFast

        build: Any = PreTrainedTokenizerFast
        converted = build(
            tokenizer_object=self._backend,
            clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
            name_or_path=self.name_or_path,
            model_max_length=self.model_max_length,
            extra_special_tokens=list(self._special.extra),
            **self._special.named,
        )
        converted.chat_template = self.chat_template
        return converted
