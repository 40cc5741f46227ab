"""Checks of engine arguments: each takes a name and a value, and returns the value to keep."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from quire.errors import ConfigError, NotSupportedError
from quire.logits_processor import LogitsProcessor
from quire.utils.checks import shown
from quire.utils.suggest import nearest

Check = Callable[[str, Any], Any]
"""Takes an argument's name and value, returns the value as it is kept, or raises ConfigError."""

_LARGEST = 2**63 - 1

ACCELERATORS = ("cuda", "xpu", "npu", "hpu", "mtia")
"""Types of devices, as torch calls them, beside the CPU; ``cuda`` are AMD's GPUs, too."""

_DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}

_KV_CACHE_DTYPES = {
    **_DTYPES,
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "float8_e4m3fn": "fp8",
    "int8": "int8",
}


def refuse(name: str, value: object, right: str) -> ConfigError:
    """Return the error for a value that is not what is right; to be raised by the caller."""
    return ConfigError(f"{name} must be {right}, not {shown(value)}")


def boolean(name: str, value: Any) -> bool:
    """Take True or False."""
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def integer(low: int, high: float = math.inf) -> Check:
    """Return a check that takes integers from ``low`` to ``high``; a bool is none."""

    def check(name: str, value: Any) -> int:
        right = f"an integer of at least {low}" if high == math.inf else f"from {low} to {high}"
        try:
            kept = operator.index(value)
        except TypeError:
            raise refuse(name, value, right) from None
        if isinstance(value, bool) or not low <= kept <= high:
            raise refuse(name, value, right)
        if high == math.inf and kept > _LARGEST:
            raise refuse(name, value, f"from {low} to 2**63 - 1")
        return kept

    return check


def number(low: float, high: float, *, above_low: bool = False) -> Check:
    """Return a check that takes numbers from ``low``, or above it, to ``high``."""
    right = f"a number {'above' if above_low else 'of at least'} {low:g}"
    if high != math.inf:
        right += f" and at most {high:g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(name, value, right)
        if not low <= value <= high or (above_low and value == low):
            raise refuse(name, value, right)
        try:
            return float(value)
        except OverflowError:
            raise refuse(name, value, right) from None

    return check


def text(name: str, value: Any) -> str:
    """Take a string that is not empty, or a path as one."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise refuse(name, value, "a string that is not empty, or a path")
    return value


def choice(*choices: str, later: Collection[str] = ()) -> Check:
    """Return a check that takes one of ``choices``; those in ``later`` are not offered yet."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        if isinstance(value, str) and value in later:
            raise not_offered(name, value, choices[0])
        raise refuse(name, value, "one of " + ", ".join(map(repr, choices)))

    return check


def _text_of(value: Any) -> str:
    # An integer of thousands of digits has no text, and is neither a dtype nor a device.
    return "" if isinstance(value, int) else str(value)


def dtype(name: str, value: Any) -> str:
    """Take a dtype by name, or torch's own; return its full name."""
    # A torch.dtype is told by its text: this module does not import torch.
    kept = _DTYPES.get(_text_of(value).removeprefix("torch."))
    if kept is None:
        raise refuse(name, value, "one of " + ", ".join(map(repr, _DTYPES)))
    return kept


def kv_cache_dtype(name: str, value: Any) -> str:
    """Take what keys and values are kept in, by name or as torch's dtype; return its name."""
    kept = _KV_CACHE_DTYPES.get(_text_of(value).removeprefix("torch."))
    if kept is not None:
        return kept
    if isinstance(value, str) and value.startswith("fp8_"):
        raise NotSupportedError(
            f"{name}={value!r} is not offered by this version of quire; use 'fp8', which is e4m3 "
            "with a scale for each token and head, or 'int8'"
        )
    raise refuse(name, value, "one of " + ", ".join(map(repr, _KV_CACHE_DTYPES)))


def device(name: str, value: Any) -> str:
    """Take a device by name, or torch's own; return its name."""
    kept = _text_of(value)
    kind, colon, index = kept.partition(":")
    if kind not in ("auto", "cpu", *ACCELERATORS) or (
        colon and not (kind in ACCELERATORS and re.fullmatch("[0-9]{1,3}", index))
    ):
        raise refuse(
            name,
            value,
            "'auto', 'cpu', or an accelerator as torch calls it, with or without a number: "
            + ", ".join(f"'{each}', '{each}:<number>'" for each in ACCELERATORS),
        )
    return kept


def model_len(name: str, value: Any) -> int | None:
    """Take a number of tokens; -1 is None, whatever fits."""
    # vLLM is asked for the longest that fits by -1.
    if isinstance(value, int) and value == -1:
        return None
    length: int = integer(1)(name, value)
    return length


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Take a mapping with strings for keys."""
    if callable(value):
        raise NotSupportedError(
            f"{name}={value!r}: this version of quire takes a dict of fields, not a function"
        )
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refuse(name, value, "a dict whose keys are strings")
    return dict(value)


_LOAD_FORMATS = ("auto", "hf", "dummy")


def load_format(name: str, value: Any) -> str:
    """Take where weights come from: the model's files, or nowhere."""
    if isinstance(value, str) and value in _LOAD_FORMATS:
        return value
    if isinstance(value, str) and value:
        raise not_offered(name, value, "auto")  # vLLM knows more of them
    raise refuse(name, value, "one of " + ", ".join(map(repr, _LOAD_FORMATS)))


def quantization(name: str, value: Any) -> str:
    """Take the name of a quantization, or one of its other names."""
    kept = text(name, value)
    # Later than this module: it asks installed packages.
    from quire.quantization.registry import check_name

    check_name(name, kept)
    return kept


GENERATION_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "eos_token_id",
)
"""Fields of ``generation_config.json`` that mean something here."""


def generation_fields(name: str, value: Any) -> dict[str, Any]:
    """Take a mapping whose keys are fields of ``generation_config.json``."""
    kept = mapping(name, value)
    for key in kept:
        if key not in GENERATION_FIELDS:
            guess = nearest(key, GENERATION_FIELDS)
            hint = "" if guess is None else f": did you mean {guess!r}?"
            right = f"a dict with the keys {', '.join(map(repr, GENERATION_FIELDS))}"
            raise ConfigError(f"{refuse(name, value, right)}{hint}")
    return kept


def token(name: str, value: Any) -> str | bool:
    """Take an access token, or whether to use the stored one; the message does not repeat it."""
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise ConfigError(f"{name} must be a string, True (the stored token) or False")


def processors(name: str, value: Any) -> tuple[Any, ...]:
    """Take a list of logits processors or of their classes."""
    right = "a list of quire.LogitsProcessor objects, or of subclasses of it"
    if not isinstance(value, (list, tuple)):
        raise refuse(name, value, right)
    for item in value:
        is_class = isinstance(item, type) and issubclass(item, LogitsProcessor)
        if not is_class and not isinstance(item, LogitsProcessor):
            raise refuse(name, value, right)
    return tuple(value)


def anything(name: str, value: Any) -> Any:
    """Take whatever it is."""
    return value


def not_offered(name: str, value: object, off: object) -> NotSupportedError:
    """Return the error for a value that only a later version takes; to be raised by the caller."""
    return NotSupportedError(
        f"{name}={shown(value)} is not offered by this version of quire; "
        f"leave it out or set it to {off!r}"
    )
