"""Checkpoint folders: copied, and changed in one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quire.models.decoder import Decoder

Load = Callable[..., Decoder]
Make = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
