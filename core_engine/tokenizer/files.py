"""The files of a folder that say how a model's text is tokenized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import TokenizerError
from quire.tokenizer.special_tokens import UNNAMED, token_content
from quire.utils.checks import shown

CONVERTIBLE_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""What quire reads by itself; the last two belong together."""

_CLASS_OF_MODEL_TYPE = {
    "falcon": "PreTrainedTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mpt": "GPTNeoXTokenizer",
    "opt": "GPT2Tokenizer",
    "phi3": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_SPECIAL_TOKENS_OF_CLASS: Mapping[str, Mapping[str, str]] = {
    "CodeGenTokenizer": _GPT2,
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "LlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's folder, its configuration read.

    Attributes
    ----------
    folder : Path
    config : dict
        ``tokenizer_config.json``, with the special tokens of ``special_tokens_map.json``.
    tokenizer_class : str
        The class that the configuration or the model's type names, without ``Fast``; ``""``
        where nothing names one.
    added_tokens : dict of int to dict
        Traits of the tokens that come on top of the vocabulary, by id.
    chat_template : str, dict of str to str, or None
    """

    folder: Path
    config: dict[str, Any]
    tokenizer_class: str
    added_tokens: dict[int, dict[str, Any]]
    chat_template: str | dict[str, str] | None

    @property
    def default_special_tokens(self) -> Mapping[str, str]:
        """Special tokens of the class, for those that the configuration leaves out."""
        return _SPECIAL_TOKENS_OF_CLASS.get(self.tokenizer_class, {})

    def find(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or None if it is not there."""
        path = self.folder / name
        return path if path.is_file() else None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    TokenizerError
        If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not a readable JSON file: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, it holds {type(value).__name__}")
    return value


def read_files(folder: Path, model_config: Mapping[str, Any] | None) -> TokenizerFiles:
    """Read the configuration of a tokenizer's folder.

    Parameters
    ----------
    folder : Path
    model_config : mapping, optional
        The model's ``config.json``; the folder's own is read where this is not given.

    Raises
    ------
    TokenizerError
        If the folder is none, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise TokenizerError(f"there is no tokenizer folder {str(folder)!r}")
    config = _read_named_tokens(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        added = _added_tokens(config["added_tokens_decoder"], folder / "tokenizer_config.json")
    else:
        config.update(_read_named_tokens(folder / "special_tokens_map.json"))
        added = _legacy_added_tokens(folder, config)
    if model_config is None:
        model_config = _read_object(folder / "config.json")
    model_type = str(model_config.get("model_type", ""))
    tokenizer_class = (
        config.get("tokenizer_class")
        or model_config.get("tokenizer_class")
        or _CLASS_OF_MODEL_TYPE.get(model_type, "")
    )
    return TokenizerFiles(
        folder=folder,
        config=config,
        tokenizer_class=str(tokenizer_class).removesuffix("Fast"),
        added_tokens=added,
        chat_template=_chat_template(folder, config),
    )


def _read_named_tokens(path: Path) -> dict[str, Any]:
    """Read a file that names special tokens, and check what it says of them."""
    config = _read_object(path)
    for name, value in config.items():
        contents = [value] if name.endswith("_token") else []
        if name in UNNAMED and value:
            if not isinstance(value, (list, dict)):
                raise TokenizerError(
                    f"{name} of {path} must be a list of tokens, or an object of tokens by name, "
                    f"got {shown(value)}"
                )
            contents = list(value.values()) if isinstance(value, dict) else value
        for content in map(token_content, contents):
            if content is not None:
                _check_encodable(content, f"{name} of {path}")
    return config


def _check_encodable(content: str, where: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where} must be text that UTF-8 can write, got {shown(content)}, which has half of "
            "a surrogate pair"
        ) from error


def _added_tokens(value: Any, path: Path) -> dict[int, dict[str, Any]]:
    try:
        added = {int(id_): {**traits} for id_, traits in value.items()}
        if not all(isinstance(traits["content"], str) for traits in added.values()):
            raise TypeError("a content is no string")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"added_tokens_decoder of {path} must map token ids to objects with a 'content'"
        ) from error
    for traits in added.values():
        _check_encodable(traits["content"], f"added_tokens_decoder of {path}")
    return added


def _legacy_added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Read ``added_tokens.json``, where checkpoints of before 2023 list them."""
    special: set[str | None] = set()
    for name, value in config.items():
        if name.endswith(("_token", "_special_tokens")):
            special.update(map(token_content, value if isinstance(value, list) else [value]))
    path = folder / "added_tokens.json"
    added = {}
    for token, id_ in _read_object(path).items():
        _check_encodable(token, f"a token of {path}")
        if isinstance(id_, bool) or not isinstance(id_, int):
            raise TokenizerError(
                f"{path} must map tokens to their ids, got {shown(id_)} for {shown(token)}"
            )
        added[id_] = {
            "content": token,
            "special": token in special,
            "normalized": token not in special,
        }
    return added


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template; files of their own go before ``tokenizer_config.json``."""
    named: dict[str, str] = {}
    default = folder / "chat_template.jinja"
    paths = {"default": default} if default.is_file() else {}
    paths.update(
        (path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    )
    for name, path in paths.items():
        try:
            named[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} is not a readable chat template: {error}") from error
    if set(named) == {"default"}:
        return named["default"]
    if named:
        return named
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        return {str(item["name"]): str(item["template"]) for item in template}
    except (KeyError, TypeError) as error:
        raise TokenizerError(
            f"chat_template of {folder / 'tokenizer_config.json'} must be a template, or a list "
            "of objects with 'name' and 'template'"
        ) from error
