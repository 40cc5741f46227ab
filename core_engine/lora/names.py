"""Names: what a tensor of an adapter's file is, and of which module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from quire.errors import AdapterError

Role = Literal[
    "A",
    "B",
    "B.bias",
    "embedding_A",
    "embedding_B",
    "magnitude",
    "weight",
    "bias",
    "base_layer.weight",
]

_ROLES: dict[str, Role | None] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B.bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base_layer.weight",
    "base_layer.bias": "bias",
    "lora_velora_embed": None,  # used by the backward pass alone
    "weight": "weight",
    "bias": "bias",
}
_NAME = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_.*|base_layer\.(?:weight|bias)|weight|bias)", re.DOTALL
)
_PREFIXES = ("base_model.model.", "base_model.")


def by_module(names: Iterable[str], path: Path) -> dict[str, dict[Role, str]]:
    """Sort the tensors of an adapter by the module that each belongs to.

    Parameters
    ----------
    names
        Of the tensors.
    path
        The file, for messages.

    Returns
    -------
    dict
        Module (without peft's prefix) -> role -> name of the tensor.

    Raises
    ------
    AdapterError
        A tensor is none that peft makes for a LoRA adapter, or is there twice.
    """
    modules: dict[str, dict[Role, str]] = {}
    for name in names:
        plain = name
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                plain = name[len(prefix) :]
                break
        match = _NAME.fullmatch(plain)
        if match is None or match["role"] not in _ROLES:
            raise AdapterError(
                f"{path} has a tensor {name!r:.200}, which is none of those that are supported: a "
                "module's name and lora_A.weight, lora_B.weight, lora_embedding_A, "
                "lora_embedding_B, lora_magnitude_vector, base_layer.bias or the like"
            )
        role = _ROLES[match["role"]]
        if role is None:
            continue
        roles = modules.setdefault(match["module"], {})
        if role in roles:
            raise AdapterError(
                f"{path} has {roles[role]!r:.200} and {name!r:.200}, which are the same"
            )
        roles[role] = name
    return modules
