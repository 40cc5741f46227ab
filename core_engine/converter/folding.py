"""Where factors of a projection's inputs can go: into what makes these inputs.

Checkpoints have no place for factors. A norm's weight takes those of the projections that alone
read it, and the rows of a gated MLP's "up" those of "down".
"""

from __future__ import annotations

from typing import Literal

import torch

from quire.models.spec import LayerSpec, NormSpec

Home = Literal["attention_norm", "mlp_norm", "up"]


def home_of(linear: str, layer: LayerSpec) -> Home | None:
    """Return what takes the factors of a projection.

    Parameters
    ----------
    linear
        Its name within the layer: ``attention.qkv``.
    layer

    Returns
    -------
    {"attention_norm", "mlp_norm", "up"} or None
        None: nothing can. The mix of values that ``attention.out`` reads is of heads that share
        keys and values; an activation without a gate is not linear; and a norm that is also the
        residual, or is read by attention and MLP alike, or by many experts, would change more than
        one input.
    """
    if linear.startswith("mlp.") and linear.endswith(".down"):  # an expert's, too
        return "up" if layer.mlp.gated else None
    if layer.residual == "post":
        return None
    if linear == "attention.qkv":
        shared = layer.residual == "parallel" and layer.mlp_norm is None
        return "attention_norm" if layer.attention_norm.weight and not shared else None
    if linear in ("mlp.gate_up", "mlp.up") and layer.mlp_norm is not None:
        return "mlp_norm" if layer.mlp_norm.weight else None
    return None


def fold_into_norm(
    kind: str, tensor: torch.Tensor, factors: torch.Tensor, norm: NormSpec
) -> torch.Tensor:
    """Return a norm's ``weight`` or ``bias`` with which what it gives is multiplied by factors.

    Parameters
    ----------
    kind : {"weight", "bias"}
    tensor, factors : Tensor[hidden_size]
    norm

    Returns
    -------
    Tensor[hidden_size], float32
    """
    offset = norm.weight_offset if kind == "weight" else 0.0
    return (tensor.float() + offset) * factors - offset
