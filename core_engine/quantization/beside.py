"""Configurations that older tools wrote beside config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILES = ("quantize_config.json", "quant_config.json")
"""Where to look, in this order, if config.json has no ``quantization_config``."""


def with_method(file: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return such a file's content with the ``quant_method`` that it means.

    Parameters
    ----------
    file
        One of `FILES`.
    config
        What it has.

    Returns
    -------
    dict or None
        None: nothing says what it means.
    """
    method = config.get("quant_method")
    if not isinstance(method, str):
        if "wbits" in config:
            method = "squeezellm"
        elif "w_bit" in config:
            method = "awq"
        elif "bits" in config and file == FILES[0]:
            method = "gptq"
        else:
            return None
    return {**config, "quant_method": method}
