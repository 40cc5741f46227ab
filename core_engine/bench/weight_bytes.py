"""How many bytes of weights a step reads, and how many a layer of a checkpoint has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.decoder import Decoder


def step_bytes(decoder: Decoder) -> int:
    """Return the bytes of weights that a step of a loaded model reads: codes, scales and all.

    Of a table with a row for each token or position a step reads a few rows, which do not count; an
    embedding that is the output matrix, too, does.
    """
    weights = decoder.weights
    total = decoder.weight_bytes()
    tables = ["embed_positions.weight"]
    if "lm_head.weight" in weights:
        tables.append("embed.weight")
    for name in tables:
        if name in weights:
            coded = weights.coded(name)
            total -= weights[name].nbytes if coded is None else coded.num_bytes
    return total


def layer_bytes(folder: Path) -> int:
    """Return the bytes of the largest layer of a folder's safetensors files, as they are stored."""
    from quire.models.safetensors_file import SafetensorsFile

    layers: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            for name in file.names():
                if (layer := re.match(r".*?\.\d+(?=\.)", name)) is not None:
                    tensor = file.tensor(name)
                    layers[layer[0]] += tensor.nbytes
                    del tensor
    return max(layers.values(), default=0)
