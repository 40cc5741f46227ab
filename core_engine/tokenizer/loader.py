"""Find and load the tokenizer of a model's folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, TokenizerError
from quire.tokenizer.bpe_files import BYTE_LEVEL_CLASSES, build_byte_level_bpe
from quire.tokenizer.files import CONVERTIBLE_FILES, TokenizerFiles, read_files
from quire.tokenizer.sentencepiece_model import build_from_sentencepiece, read_model
from quire.tokenizer.special_tokens import SpecialTokens, read_special_tokens
from quire.tokenizer.tokenizer import Tokenizer
from quire.utils.suggest import nearest

if TYPE_CHECKING:
    import tokenizers

_LOG = logging.getLogger(__name__)

TOKENIZER_MODES = ("auto", "hf", "fast", "slow")

_OTHER_FILES = (
    "tiktoken.model",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)
"""Vocabularies that are left to transformers."""

_CLASSES_WITHOUT_FILES = frozenset(["ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"])


def load_tokenizer(
    path: Path | str,
    *,
    mode: str = "auto",
    trust_remote_code: bool = False,
    model_config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load the tokenizer of a folder.

    ``tokenizer.json`` is read as it is; without one, ``tokenizer.model`` (sentencepiece) or
    ``vocab.json`` with ``merges.txt`` (byte-level BPE) are turned into the same. Only what none
    of them serves, and ``mode="slow"``, imports transformers.

    Parameters
    ----------
    path : Path or str
        A local folder.
    mode : {"auto", "hf", "fast", "slow"}, default "auto"
        ``"slow"`` leaves everything to transformers; the others mean the same.
    trust_remote_code : bool, default False
        Accepted, and without effect: code that comes with a checkpoint is never run.
    model_config : mapping, optional
        The model's configuration; its ``vocab_size`` must hold every token id.

    Returns
    -------
    Tokenizer

    Raises
    ------
    ConfigError
        If the mode is unknown.
    TokenizerError
        If there is no tokenizer, or it is damaged, or does not fit the model.
    """
    del trust_remote_code
    if mode not in TOKENIZER_MODES:
        guess = nearest(str(mode), TOKENIZER_MODES)
        hint = f": did you mean {guess!r}?" if guess is not None else ""
        raise ConfigError(f"tokenizer_mode must be one of {TOKENIZER_MODES}, got {mode!r}{hint}")
    files = read_files(Path(path), model_config)
    tokenizer = None if mode == "slow" else _load_native(files)
    if tokenizer is None:
        tokenizer = _load_with_transformers(files, is_asked_for=mode == "slow")
    if model_config is not None and isinstance(model_config.get("vocab_size"), int):
        _check_fits(tokenizer, model_config["vocab_size"])
    return tokenizer


def _load_native(files: TokenizerFiles) -> Tokenizer | None:
    """Load what the ``tokenizers`` library can hold; None if there is nothing of that kind."""
    defaults = dict(files.default_special_tokens)
    is_complete = False
    if path := files.find("tokenizer.json"):
        backend = _read_tokenizer_json(path)
        is_complete = True
    elif path := files.find("tokenizer.model"):
        try:
            model = read_model(path)
        except TokenizerError:
            if _is_tiktoken(path):
                return None
            raise
        prefix_everywhere = bool(files.config.get("legacy", True))
        try:
            backend = build_from_sentencepiece(model, prefix_everywhere=prefix_everywhere)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(f"{path} is damaged or unusual: {error}") from error
        defaults.update(model.special_tokens())
    elif (path := files.find("vocab.json")) and (merges := files.find("merges.txt")):
        if files.tokenizer_class not in BYTE_LEVEL_CLASSES:
            return None
        backend = build_byte_level_bpe(files, path, merges)
    else:
        return None
    backend.no_truncation()
    backend.no_padding()
    if files.config.get("split_special_tokens"):
        backend.encode_special_tokens = True
    special = _register_special_tokens(backend, files, defaults)
    if not is_complete:
        # tokenizer.json says by itself what goes around a text; other files leave it to flags.
        is_sentencepiece = files.find("tokenizer.model") is not None
        _surround_text(backend, files, special, bos_by_default=is_sentencepiece)
    length = files.config.get("model_max_length")
    return Tokenizer(
        backend,
        special,
        chat_template=files.chat_template,
        clean_up_tokenization_spaces=bool(files.config.get("clean_up_tokenization_spaces", False)),
        name_or_path=str(files.folder),
        # transformers writes a huge number, or Infinity, where there is no limit.
        model_max_length=int(length)
        if isinstance(length, (int, float)) and math.isfinite(length)
        else None,
    )


def _is_tiktoken(path: Path) -> bool:
    """Whether a vocabulary is tiktoken's: lines of a base64 token and its rank."""
    with path.open("rb") as file:
        line = file.readline(1000).split()
    return len(line) == 2 and line[1].isdigit()


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer that can be read: {error}") from error


def _register_special_tokens(
    backend: tokenizers.Tokenizer, files: TokenizerFiles, defaults: Mapping[str, str]
) -> SpecialTokens:
    """Make the tokens that the configuration names known to the backend."""
    from tokenizers import AddedToken

    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    traits = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = []
    for _, entry in sorted(files.added_tokens.items()):
        settings = {name: bool(entry[name]) for name in traits if name in entry}
        token = AddedToken(entry["content"], **settings)
        if repr(token) not in known:
            tokens.append(token)
    backend.add_tokens(tokens)
    for id_, entry in files.added_tokens.items():
        actual = backend.token_to_id(entry["content"])
        if actual != id_:
            _LOG.warning(
                "%s: token %r should have id %d and has %s",
                files.folder,
                entry["content"],
                id_,
                actual,
            )
    special = read_special_tokens(files.config, {})
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in [*special.named.values(), *special.extra] if token not in added]
    backend.add_tokens([AddedToken(token, special=True) for token in dict.fromkeys(missing)])
    # A default of the class counts only where the vocabulary has it.
    usable = {
        name: token for name, token in defaults.items() if backend.token_to_id(token) is not None
    }
    complete = read_special_tokens(files.config, usable)
    unmarked = [token for token in complete.named.values() if token not in added]
    backend.add_tokens([AddedToken(token, special=True) for token in unmarked])
    return complete


def _surround_text(
    backend: tokenizers.Tokenizer,
    files: TokenizerFiles,
    special: SpecialTokens,
    *,
    bos_by_default: bool,
) -> None:
    """Put BOS and EOS around texts as ``add_bos_token`` and ``add_eos_token`` say."""
    from tokenizers import processors

    bos = special.named.get("bos_token")
    eos = special.named.get("eos_token")
    before = bos if files.config.get("add_bos_token", bos_by_default) else None
    behind = eos if files.config.get("add_eos_token", False) else None
    if before is None and behind is None:
        return
    parts = [token for token in (before, "$A", behind) if token is not None]
    tokens = []
    for token in dict.fromkeys(token for token in (before, behind) if token is not None):
        id_ = backend.token_to_id(token)
        assert id_ is not None
        tokens.append((token, id_))
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), pair=None, special_tokens=tokens
    )


def _load_with_transformers(files: TokenizerFiles, *, is_asked_for: bool) -> Tokenizer:
    names = (*CONVERTIBLE_FILES, *_OTHER_FILES)
    if files.tokenizer_class not in _CLASSES_WITHOUT_FILES and not any(map(files.find, names)):
        own_code = (
            "; its tokenizer is Python code that comes with the checkpoint, which quire never runs"
            if "auto_map" in files.config
            else ""
        )
        raise TokenizerError(
            f"{files.folder} holds no tokenizer: looked for {', '.join(names)}{own_code}; pass "
            "tokenizer= to take another folder's, or skip_tokenizer_init=True to give token ids "
            "only"
        )
    from quire.tokenizer.transformers_tokenizer import load_with_transformers

    return load_with_transformers(files, is_asked_for=is_asked_for)


def _check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids the model has no embeddings for."""
    if len(tokenizer) <= vocab_size:
        return
    # Checkpoints are common whose padding token lies behind the last embedding; nothing that
    # quire does ever feeds it to the model.
    unused = {tokenizer.pad_token_id}
    excess = [id_ for id_ in tokenizer.get_vocab().values() if id_ >= vocab_size]
    if set(excess) <= unused:
        return
    raise TokenizerError(
        f"the tokenizer does not fit the model: its token ids go up to {max(excess)}, the model's "
        f"vocab_size is {vocab_size}; pass the tokenizer= that the model was trained with"
    )
