"""Which modules a configuration means, by the checkpoint's names."""

from __future__ import annotations

HEADS = frozenset({"lm_head", "embed_out", "output_layer"})
"""Last components of the names that output layers have in checkpoints."""


def in_block(module: str) -> bool:
    """Whether a module is in one of the model's layers: its name has a number."""
    return any(part.isdecimal() for part in module.split("."))


def is_head(module: str) -> bool:
    """Whether a module is the output layer."""
    return module.rpartition(".")[2] in HEADS


def has_part(module: str, part: str) -> bool:
    """Whether whole components of a module's name, one after another, are `part`."""
    return f".{part}." in f".{module}."
