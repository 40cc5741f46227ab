"""Checkpoints of mixtures of experts, kept in other ways than files usually have them."""

from __future__ import annotations

import torch
from folders import Tensors

MIXTRAL = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


def stack(tensors: Tensors) -> None:
    """Name and keep the experts of ``CONFIGS["mixtral"]`` as transformers has them in memory."""
    for layer in range(3):
        theirs, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (
            torch.stack([tensors.pop(MIXTRAL.format(layer, each, name)) for each in range(6)])
            for name in ("w1", "w2", "w3")
        )
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.cat((w1, w3), 1)
        tensors[f"{mlp}.experts.down_proj"] = w2
        tensors[f"{mlp}.gate.weight"] = tensors.pop(f"{theirs}.gate.weight")
