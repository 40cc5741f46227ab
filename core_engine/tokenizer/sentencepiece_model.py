"""A sentencepiece ``tokenizer.model``, read and turned into a ``tokenizers`` object.

The file is a protocol buffer, described by ``sentencepiece_model.proto`` of
https://github.com/google/sentencepiece. Its few fields that matter are read here, so neither
sentencepiece nor protobuf needs to be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""The character that stands for a space in sentencepiece vocabularies."""

_ALL = 1 << 20


class PieceType(IntEnum):
    """``SentencePiece.Type`` of the format, as far as types differ here."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


class Algorithm(IntEnum):
    """``TrainerSpec.ModelType`` of the format, as far as it is read here."""

    UNIGRAM = 1
    BPE = 2
    CHAR = 4


@dataclass
class SentencePieceModel:
    """What a ``tokenizer.model`` says.

    Attributes
    ----------
    pieces : list of (str, float, int)
        Text, score and :class:`PieceType` of each token id.
    algorithm : int
        One of :class:`Algorithm`.
    byte_fallback : bool
        Whether characters without a piece are spelled as bytes.
    unk_id, bos_id, eos_id, pad_id : int
        -1 where there is none.
    charsmap : bytes
        The normalization table, compiled; empty for none.
    add_dummy_prefix : bool
        Whether a space is put before a text.
    remove_extra_whitespaces : bool
        Whether spaces are trimmed, and runs of them shortened to one.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    algorithm: int = Algorithm.UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def special_tokens(self) -> dict[str, str]:
        """Return the special tokens by name."""
        ids = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "unk_token": self.unk_id,
            "pad_token": self.pad_id,
        }
        return {
            name: self.pieces[id_][0] for name, id_ in ids.items() if 0 <= id_ < len(self.pieces)
        }


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield field numbers and values of a protocol buffer message."""
    position = 0
    end = len(data)
    while position < end:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
        if position + size > end:
            raise ValueError("a field reaches beyond the end")
        yield key >> 3, data[position : position + size]
        position += size


def _signed(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value - (1 << 64) if value >> 63 else value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return value


def _parse_piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def parse_model(data: bytes) -> SentencePieceModel:
    """Parse the bytes of a ``tokenizer.model``.

    Raises
    ------
    ValueError
        If they are no sentencepiece model.
    """
    model = SentencePieceModel()
    trainer_names = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id", 3: "algorithm"}
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_parse_piece(_message(value)))
            elif number == 2:
                for inner, setting in _fields(_message(value)):
                    if inner in trainer_names:
                        setattr(model, trainer_names[inner], _signed(setting))
                    elif inner == 35:
                        model.byte_fallback = bool(setting)
            elif number == 3:
                for inner, setting in _fields(_message(value)):
                    if inner == 2:
                        model.charsmap = _message(setting)
                    elif inner == 3:
                        model.add_dummy_prefix = bool(setting)
                    elif inner == 4:
                        model.remove_extra_whitespaces = bool(setting)
    except (IndexError, struct.error, UnicodeDecodeError, AssertionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def read_model(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises
    ------
    TokenizerError
        If it cannot be read, or is no sentencepiece model.
    """
    try:
        return parse_model(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, first to last.

    sentencepiece joins the two neighbours whose union has the best score; so every way to split
    a piece into two is a merge, ranked as the piece is.
    """
    mergeable = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
    rank = {
        text: (-score, id_)
        for id_, (text, score, kind) in enumerate(model.pieces)
        if kind in mergeable
    }
    found = []
    for text, position in rank.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                found.append((position, cut, left, right))
    found.sort()
    return [(left, right) for _, _, left, right in found]


def build_from_sentencepiece(
    model: SentencePieceModel, *, prefix_everywhere: bool
) -> tokenizers.Tokenizer:
    """Build the tokenizer of a sentencepiece model.

    Parameters
    ----------
    model : SentencePieceModel
    prefix_everywhere : bool
        Whether the text behind a special token gets the space that is put before a text, as
        sentencepiece does to every text it is given; otherwise only the text at the start.

    Raises
    ------
    TokenizerError
        If the model's algorithm is one that splits text into words only.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    if model.algorithm == Algorithm.UNIGRAM:
        backend = Tokenizer(
            models.Unigram(
                [(text, score) for text, score, _ in model.pieces],
                unk_id=model.unk_id,
                byte_fallback=model.byte_fallback,
            )
        )
    elif model.algorithm in (Algorithm.BPE, Algorithm.CHAR):
        backend = Tokenizer(
            models.BPE(
                vocab={text: id_ for id_, (text, _, _) in enumerate(model.pieces)},
                merges=_merges(model) if model.algorithm == Algorithm.BPE else [],
                unk_token=model.pieces[model.unk_id][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    else:
        raise TokenizerError(
            f"the sentencepiece model's type is {model.algorithm}; quire reads unigram (1), "
            "BPE (2) and char (4)"
        )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        # normalizers.Strip would take other white space, too.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix_everywhere or not model.add_dummy_prefix:
        if model.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    decoding += [decoders.ByteFallback(), decoders.Fuse()]
    if model.remove_extra_whitespaces:
        decoding.append(decoders.Strip(" ", _ALL, 0))
    elif model.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    added = [
        AddedToken(text, special=kind != PieceType.USER_DEFINED, normalized=SPACE in text)
        for text, _, kind in model.pieces
        if kind in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend
