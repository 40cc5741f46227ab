"""Which tokens are special, and by which names a checkpoint's files call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STANDARD_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
UNNAMED = ("extra_special_tokens", "additional_special_tokens")
"""What the files call a list of special tokens; the first goes before the second."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes
    ----------
    named : dict of str to str
        Content by name: ``bos_token``, ``eos_token`` and so on, then names of the model's own.
    extra : tuple of str
        Special tokens without a name.
    """

    named: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


def token_content(value: Any) -> str | None:
    """Return the content of a token as the files write it: a text, or a dict of its traits."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        content: str = value["content"]
        return content
    return None


def read_special_tokens(config: Mapping[str, Any], defaults: Mapping[str, str]) -> SpecialTokens:
    """Read the special tokens out of a tokenizer's configuration.

    Parameters
    ----------
    config : mapping
        ``tokenizer_config.json``, with what ``special_tokens_map.json`` adds.
    defaults : mapping of str to str
        What the tokenizer's class has where the configuration says nothing.

    Returns
    -------
    SpecialTokens
    """
    named: dict[str, str] = {}
    for name in STANDARD_NAMES:
        content = token_content(config[name]) if name in config else defaults.get(name)
        if content is not None:
            named[name] = content
    own = [name for name in config if name.endswith("_token") and name not in STANDARD_NAMES]
    for name in own:
        content = token_content(config[name])
        if content is not None:
            named[name] = content
    extra = next((config[name] for name in UNNAMED if config.get(name)), ())
    if isinstance(extra, Mapping):
        for name, value in extra.items():
            content = token_content(value)
            if content is not None:
                named[name] = content
        extra = ()
    contents = (token_content(value) for value in extra)
    return SpecialTokens(named, tuple(content for content in contents if content is not None))
