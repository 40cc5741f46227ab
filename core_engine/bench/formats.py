"""The formats of weights that can be measured: made while loading, or read from a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.bench.random_codes import FORMATS as FOLDERS
from quire.bench.random_codes import random_codes

BASE = "plain"
"""The weights as the checkpoint has them."""

ON_LOAD: dict[str, dict[str, Any]] = {
    BASE: {},
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "int4": {"quantization": "int4"},
    "int4-head": {"quantization": "int4", "quantization_config": {"lm_head": "int4"}},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
}
"""Engine arguments by name; ``int4-head`` has the output matrix in 4 bits, too."""

NAMES = (*ON_LOAD, *FOLDERS)


@dataclass(frozen=True, slots=True)
class Format:
    """A format, and how the engine gets weights in it.

    Attributes
    ----------
    name : str
    folder : Path
        What is loaded.
    options : dict
        Engine arguments.
    """

    name: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)


def find_format(name: str, checkpoint: Path) -> Format:
    """Return the format of a name; a folder of random codes is made at the first use.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    checkpoint : Path
        Whose weights are quantized, or whose dimensions the codes have.
    """
    if name in ON_LOAD:
        return Format(name, checkpoint, ON_LOAD[name])
    return Format(name, random_codes(checkpoint, name))
