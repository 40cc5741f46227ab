"""What each token id contributes to the text, for the decoders that work token by token."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DecodeKind(enum.Enum):
    """How the text of a sequence follows from the texts of its tokens."""

    BYTES = enum.auto()
    """Tokens are bytes; the text is their concatenation, read as UTF-8 (byte-level BPE)."""
    PIECES = enum.auto()
    """Tokens are texts, or single bytes where the vocabulary falls back to bytes."""
    WINDOW = enum.auto()
    """No such rule is known: the text of a window of tokens must be decoded as a whole."""


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    The alphabet is GPT-2's: printable Latin-1 bytes stand for themselves, the others for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; one with other characters is plain text."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode("utf-8", errors="replace")


class TokenPieces:
    """A tokenizer's decoder, taken apart into one piece per token id.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    cleans_up : bool
        Whether a clean-up that looks across tokens follows the decoder.

    Attributes
    ----------
    kind : DecodeKind
        How whole texts come about.
    token_kind : DecodeKind
        How the text of a single token does.
    special_ids : frozenset of int
        Ids that ``skip_special_tokens`` leaves out.
    added : mapping of int to str
        Added tokens, special or not, by id.
    strip_content : str
        Character that is taken from the start of the whole text,
    strip_count : int
        so many times at most.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, cleans_up: bool) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added: Mapping[int, str] = {id_: token.content for id_, token in added.items()}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.strip_content = " "
        self.strip_count = 0
        self._per_token: Any = None
        self._has_byte_tokens = False
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, tuple[str, str] | int | None] = {}
        self.token_kind = self._analyse()
        self.kind = DecodeKind.WINDOW if cleans_up else self.token_kind

    def _analyse(self) -> DecodeKind:
        decoder = self._backend.decoder
        if decoder is None:
            return DecodeKind.PIECES
        state = json.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        names = [step["type"] for step in steps]
        if names in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return DecodeKind.BYTES
        if names and names[-1] == "Strip" and "Fuse" in names:
            strip = steps.pop()
            names.pop()
            if strip["stop"]:
                return DecodeKind.WINDOW
            self.strip_content, self.strip_count = strip["content"], strip["start"]
        if names and names[-1] == "Fuse":
            steps.pop()
            names.pop()
        elif self.strip_count:
            return DecodeKind.WINDOW
        if names and names[-1] == "ByteFallback":
            self._has_byte_tokens = True
            steps.pop()
            names.pop()
        if not set(names) <= {"Replace", "Metaspace", "WordPiece", "Strip"}:
            return DecodeKind.WINDOW
        self._per_token = _build_decoder(steps)
        return DecodeKind.PIECES

    def bytes_of(self, token_id: int) -> bytes:
        """Return a token's bytes, where ``token_kind`` is BYTES; none for an id nobody knows."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else byte_level_bytes(token)
        return found

    def text_of(self, token_id: int) -> tuple[str, str] | int | None:
        """Return a token's text, where ``token_kind`` is PIECES.

        Returns
        -------
        tuple of (str, str)
            The text as the first token of a sequence, and anywhere else.
        int
            The byte, where the token stands for one.
        None
            For an id nobody knows.
        """
        try:
            return self._texts[token_id]
        except KeyError:
            found = self._texts[token_id] = self._find_text(token_id)
            return found

    def all_bytes(self, size: int) -> list[bytes] | None:
        """Return what each id below ``size`` adds to a text that others have begun, in UTF-8.

        Special tokens and ids nobody knows add nothing. None where texts are no concatenation of
        what their tokens add.
        """
        if self.kind is DecodeKind.WINDOW:
            return None
        found = []
        for token_id in range(size):
            piece = b""
            if token_id in self.special_ids:
                pass
            elif self.kind is DecodeKind.BYTES:
                piece = self.bytes_of(token_id)
            else:
                text = self.text_of(token_id)
                if isinstance(text, int):
                    piece = bytes([text])
                elif text is not None:
                    piece = text[1].encode("utf-8", errors="replace")
            found.append(piece)
        return found

    def _find_text(self, token_id: int) -> tuple[str, str] | int | None:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if self._backend.decoder is None:
            return token, f" {token}"
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        if self._per_token is None:
            return token, token
        # A decoder may treat the first token differently: ask it for both.
        with_other = self._per_token.decode(["x", token])
        return self._per_token.decode([token]), with_other[1:]


def _build_decoder(steps: list[dict[str, Any]]) -> Any:
    from tokenizers import Regex, decoders

    built: list[decoders.Decoder] = []
    for step in steps:
        if step["type"] == "Replace":
            pattern = step["pattern"]
            find = pattern["String"] if "String" in pattern else Regex(pattern["Regex"])
            built.append(decoders.Replace(find, step["content"]))
        elif step["type"] == "Metaspace":
            built.append(
                decoders.Metaspace(
                    replacement=step["replacement"],
                    prepend_scheme=step["prepend_scheme"],
                    split=step["split"],
                )
            )
        elif step["type"] == "WordPiece":
            built.append(decoders.WordPiece(prefix=step["prefix"], cleanup=step["cleanup"]))
        else:
            built.append(decoders.Strip(step["content"], step["start"], step["stop"]))
    return decoders.Sequence(built) if built else None
