"""Byte-level BPE from ``vocab.json`` and ``merges.txt``, the files of GPT-2, OPT and Qwen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import TokenizerError
from quire.tokenizer.files import TokenizerFiles, read_json

if TYPE_CHECKING:
    import tokenizers

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before BPE; part of its vocabulary's definition."""

BYTE_LEVEL_CLASSES = frozenset(
    ["", "CodeGenTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"]
)
"""Tokenizer classes whose ``vocab.json`` is byte-level BPE."""


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not a readable text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"line {number} of {path} must be two tokens, it is {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


def build_byte_level_bpe(
    files: TokenizerFiles, vocab_path: Path, merges_path: Path
) -> tokenizers.Tokenizer:
    """Build the tokenizer of a ``vocab.json`` and a ``merges.txt``.

    Parameters
    ----------
    files : TokenizerFiles
    vocab_path, merges_path : Path

    Raises
    ------
    TokenizerError
        If one of the files is damaged, or they do not fit each other.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = read_json(vocab_path)
    merges = _read_merges(merges_path)
    try:
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:
        raise TokenizerError(f"{merges_path} does not fit {vocab_path}: {error}") from error
    backend = Tokenizer(model)
    add_prefix_space = bool(files.config.get("add_prefix_space") or False)
    if files.tokenizer_class == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
            ]
        )
    else:
        if files.tokenizer_class == "GPTNeoXTokenizer":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend
