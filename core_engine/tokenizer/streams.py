"""Token ids to text, one at a time and exact: what is given out is never taken back.

Each stream knows three things: the text that a token settles, the complete characters that
later tokens may still change, and what is left when no token follows.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from quire.tokenizer.pieces import DecodeKind, TokenPieces

REPLACEMENT = "\ufffd"

_MAX_HELD_BYTES = 64
"""Length of a run of byte tokens from which on its complete characters are given out."""


class TextStream(Protocol):
    """The text of one growing sequence."""

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text it settles."""

    def tentative(self) -> str:
        """Return complete characters after the settled text that a later token may change."""

    def rest(self) -> str:
        """Return what follows the settled text if no token comes any more."""


class ByteStream:
    """Byte-level vocabularies: bytes concatenated, decoded as UTF-8, invalid ones replaced.

    Parameters
    ----------
    pieces : TokenPieces
    skip_special_tokens : bool
    prompt_token_ids : sequence of int
        Where the prompt ends within a character, the text begins with that character.
    """

    def __init__(
        self, pieces: TokenPieces, *, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._bytes_of = pieces.bytes_of
        self._skipped = pieces.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if token_id not in self._skipped:
                tail = self._bytes_of(token_id) + tail
            if len(tail) >= 4:
                break
        self._decoder.decode(tail)
        # Bytes that the prompt left over; they are the prompt's own until the text goes on
        # with the rest of their character.
        self._borrowed = self._decoder.getstate()[0]

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text it settles."""
        if token_id in self._skipped:
            return ""
        data = self._bytes_of(token_id)
        if self._borrowed and data:
            if not _continues(self._borrowed, data[:1]):
                self._decoder.reset()
            self._borrowed = b""
        return self._decoder.decode(data)

    def tentative(self) -> str:
        """Return nothing: later bytes change no complete character."""
        return ""

    def rest(self) -> str:
        """Return U+FFFD where the text ends within a character."""
        return "" if self._borrowed else self._decoder.getstate()[0].decode("utf-8", "replace")


def _continues(start: bytes, following: bytes) -> bool:
    """Whether ``following`` goes on with the UTF-8 character that ``start`` begins."""
    try:
        (start + following).decode("utf-8")
    except UnicodeDecodeError as error:
        # Not so an incremental decoder: it waits for the third byte of a surrogate.
        return error.end > len(start)
    return True


def _complete_part(data: bytes) -> tuple[str, bytes] | None:
    """Split UTF-8 into its complete characters and an unfinished one; None if it is invalid."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return text, decoder.getstate()[0]


class PieceStream:
    """Vocabularies of texts with single bytes to fall back to, as sentencepiece makes them.

    A run of byte tokens is UTF-8, or else as many U+FFFD as it has bytes: that is how the
    ``tokenizers`` library decodes it. So a run is settled when it ends; only one longer than
    64 bytes is given out as it grows, character by character.

    Parameters
    ----------
    pieces : TokenPieces
    skip_special_tokens : bool
    join_added_tokens : bool
        Whether an added token right behind an added token loses the space before it.
    prompt_token_ids : sequence of int
        What the text continues: its leading space is kept when the prompt has text.
    """

    def __init__(
        self,
        pieces: TokenPieces,
        *,
        skip_special_tokens: bool,
        join_added_tokens: bool,
        prompt_token_ids: Sequence[int],
    ) -> None:
        self._text_of = pieces.text_of
        self._skipped = pieces.special_ids if skip_special_tokens else frozenset()
        self._added = pieces.added if join_added_tokens else {}
        self._after_added = bool(prompt_token_ids) and prompt_token_ids[-1] in self._added
        self._strip_content = pieces.strip_content
        self._run = bytearray()
        self._borrowed = 0
        self._run_is_long = False
        self._is_first = True
        self._strip_left = pieces.strip_count
        self._read_start(prompt_token_ids)
        self._read_end(prompt_token_ids)

    def _read_start(self, prompt_token_ids: Sequence[int]) -> None:
        """Let the prompt use up what is special about the start of a text."""
        for token_id in prompt_token_ids:
            text = None if token_id in self._skipped else self._text_of(token_id)
            if text is None:
                continue
            if isinstance(text, int):
                # Bytes are no leading spaces, except where one stands for the space itself.
                self._strip("\0" if text != 0x20 else " ")
            else:
                self._strip(text[0] if self._is_first else text[1])
            self._is_first = False
            if not self._strip_left:
                return

    def _read_end(self, prompt_token_ids: Sequence[int]) -> None:
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if token_id in self._skipped:
                continue
            byte = self._text_of(token_id)
            if not isinstance(byte, int) or len(tail) == 3:
                break
            tail = bytes([byte]) + tail
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        self._run += decoder.getstate()[0]
        self._borrowed = len(self._run)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_content:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text it settles."""
        if token_id in self._skipped:
            return ""
        piece = self._text_of(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._after_added = False
            self._is_first = False
            return self._feed_byte(piece)
        settled = self._end_run()
        text = piece[0] if self._is_first else piece[1]
        if self._added:
            is_added = token_id in self._added
            if is_added and self._after_added:
                text = self._added[token_id]
            self._after_added = is_added
        self._is_first = False
        return settled + (self._strip(text) if self._strip_left else text)

    def _feed_byte(self, byte: int) -> str:
        if 0 < len(self._run) == self._borrowed and not _continues(bytes(self._run), bytes([byte])):
            # The character that the prompt began is not gone on with.
            self._run.clear()
            self._borrowed = 0
        self._run.append(byte)
        if not self._run_is_long and len(self._run) < _MAX_HELD_BYTES:
            return ""
        parts = _complete_part(bytes(self._run))
        if parts is None:
            return ""
        self._run_is_long = True
        text, unfinished = parts
        self._run[:] = unfinished
        self._borrowed = 0
        return self._strip(text)

    def _run_text(self) -> str:
        own = len(self._run) - self._borrowed
        if own <= 0:
            return ""
        try:
            return self._run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * own

    def _end_run(self) -> str:
        if not self._run:
            return ""
        text = self._strip(self._run_text())
        self._run.clear()
        self._borrowed = 0
        self._run_is_long = False
        return text

    def _peek(self, text: str) -> str:
        left = self._strip_left
        text = self._strip(text)
        self._strip_left = left
        return text

    def tentative(self) -> str:
        """Return the complete characters of a run of bytes that is valid so far."""
        if len(self._run) <= self._borrowed:
            return ""
        parts = _complete_part(bytes(self._run))
        return "" if parts is None else self._peek(parts[0])

    def rest(self) -> str:
        """Return the run of bytes at the end."""
        return self._peek(self._run_text())


class WindowStream:
    """Any decoder: the last tokens are decoded together, and the very end of it is held back.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    prompt_token_ids : sequence of int
    """

    _CONTEXT = 32
    _LONGEST = 96
    _UNSETTLED_CHARACTERS = 8
    """Clean-ups and word endings change no more than this at the end of a text."""

    def __init__(
        self, decode: Callable[[list[int]], str], *, prompt_token_ids: Sequence[int]
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_token_ids[-self._CONTEXT :])
        self._text = decode(self._ids) if self._ids else ""
        self._settled = len(self._text.rstrip(REPLACEMENT))

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text it settles."""
        self._ids.append(token_id)
        self._text = self._decode(self._ids)
        stable = len(self._text.rstrip(REPLACEMENT)) - self._UNSETTLED_CHARACTERS
        settled = self._text[self._settled : stable] if stable > self._settled else ""
        self._settled += len(settled)
        if len(self._ids) > self._LONGEST:
            self._shorten()
        return settled

    def _shorten(self) -> None:
        """Drop old tokens, where what is left still gives the same end of the text."""
        ids = self._ids[-self._CONTEXT :]
        text = self._decode(ids)
        open_text = self._text[self._settled :]
        if len(text) > len(open_text) and text.endswith(open_text):
            self._ids = ids
            self._text = text
            self._settled = len(text) - len(open_text)

    def tentative(self) -> str:
        """Return the text at the end that is held back."""
        return self.rest().rstrip(REPLACEMENT)

    def rest(self) -> str:
        """Return all the text that is not settled."""
        return self._text[self._settled :]


def open_stream(
    pieces: TokenPieces | None,
    decode: Callable[[list[int]], str],
    *,
    skip_special_tokens: bool,
    join_added_tokens: bool,
    prompt_token_ids: Sequence[int] = (),
) -> TextStream:
    """Return the stream that fits a decoder.

    Parameters
    ----------
    pieces : TokenPieces or None
        The decoder taken apart; None where that is unknown.
    decode : callable
        Token ids to text with the options of this stream.
    skip_special_tokens, join_added_tokens, prompt_token_ids
        See the streams.
    """
    if pieces is None or pieces.kind is DecodeKind.WINDOW:
        return WindowStream(decode, prompt_token_ids=prompt_token_ids)
    if pieces.kind is DecodeKind.BYTES:
        return ByteStream(
            pieces, skip_special_tokens=skip_special_tokens, prompt_token_ids=prompt_token_ids
        )
    return PieceStream(
        pieces,
        skip_special_tokens=skip_special_tokens,
        join_added_tokens=join_added_tokens,
        prompt_token_ids=prompt_token_ids,
    )


def read_all(stream: TextStream, token_ids: Iterable[int]) -> str:
    """Return the text of a whole sequence."""
    return "".join([stream.feed(token_id) for token_id in token_ids]) + stream.rest()
