"""Tokens: a tokenizer as large as a real model's, for benchmarks that need no meaning."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from quire.bench.checkpoint import cache_folder

END = "<|end|>"
"""The one special token."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words with the mark or space before them, digits one by one, marks, white space."""

_MOST_TEXT = 32_000_000
"""Characters to learn from, which bounds the time; the library has about as many."""

_SCRIPTS = (
    (0x00A1, 0x0250),  # Latin
    (0x0386, 0x0400),  # Greek
    (0x0400, 0x0460),  # Cyrillic
    (0x05D0, 0x05EB),  # Hebrew
    (0x0621, 0x064B),  # Arabic
    (0x0905, 0x093A),  # Devanagari
    (0x0E01, 0x0E2F),  # Thai
    (0x3041, 0x3097),  # Hiragana
    (0x30A1, 0x30FB),  # Katakana
    (0x4E00, 0x6C00),  # Han
    (0xAC00, 0xB600),  # Hangul
    (0x1F300, 0x1F650),  # pictures
)
"""Ranges of characters, the end not included."""


def make_tokenizer(size: int, end_id: int) -> Path:
    """Return the folder of a byte-level BPE tokenizer, made at the first use.

    Its merges are learned from the modules of Python's own library, as far as these have
    something to learn; the rest are characters of many scripts, pairs of them, and pairs of words,
    which makes the long tail that vocabularies have.

    Parameters
    ----------
    size : int
        Tokens, all of them known: at least 512.
    end_id : int
        Id of the token that ends a text.
    """
    folder = cache_folder() / f"tokenizer-{size}-{end_id}"
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        unfinished = path.with_suffix(".part")
        _write(unfinished, size, end_id)
        unfinished.replace(path)
    return folder


def _write(path: Path, size: int, end_id: int) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_texts(_MOST_TEXT if size > 50_000 else 20 * size), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges = [(left, right) for left, right in learned["merges"]]
    _fill(tokens, merges, size - 1)
    tokens.insert(end_id, END)
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = words
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True)])
    made.save(str(path))


def _texts(most: int) -> Iterator[str]:
    """Return the modules of the standard library, in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")[:most]
        yield text
        most -= len(text)
        if not most:
            return


def _fill(tokens: list[str], merges: list[tuple[str, str]], size: int) -> None:
    """Add tokens until there are so many, each merged from two that are there."""
    from tokenizers import pre_tokenizers

    known = set(tokens)
    letters = [token for token in tokens if token.isascii() and token.isalpha()]
    words = [token for token in letters if len(token) > 3] or letters

    def add(left: str, right: str) -> str:
        token = left + right
        if token not in known and len(tokens) < size:
            known.add(token)
            tokens.append(token)
            merges.append((left, right))
        return token

    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    scripts = []
    for low, high in _SCRIPTS:
        scripts.append(script := list[str]())
        for code in range(low, high):
            [(character, _)] = as_bytes.pre_tokenize_str(chr(code))
            token = character[0]
            for byte in character[1:]:
                token = add(token, byte)
            script.append(token)
    rng = random.Random(0)
    while len(tokens) < size:
        for parts in (words, rng.choice(scripts)):
            left, right = rng.choice(parts), rng.choice(parts)
            if left in known and right in known:
                add(left, right)
