"""Blocks: how a packed weight lies, and how it is read again."""

from __future__ import annotations

import torch

from quire.kernels.cpu import structs


def dtype_of(tensor: torch.Tensor) -> int:
    """Return the library's number for a tensor's dtype: float32 or bfloat16."""
    return structs.DTYPES[str(tensor.dtype).removeprefix("torch.")]


def padded_shape(tensor: torch.Tensor) -> tuple[int, int]:
    """Outputs and inputs of a weight's blocks: of whole blocks, and of bfloat16 whole pairs."""
    out_features, in_features = tensor.shape
    pair = 2 if tensor.dtype == torch.bfloat16 else 1
    return out_features + -out_features % structs.BLOCK, in_features + in_features % pair


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy, in plain order, of a weight that was packed in place.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32 or bfloat16
        What is left over of the last block was packed elsewhere and is still plain in it.
    """
    out_features, in_features = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    plain = weight.clone()
    whole = out_features // structs.BLOCK * structs.BLOCK
    blocks = weight[:whole].view(-1, in_features // pair, structs.BLOCK, pair)
    plain[:whole].view(-1, structs.BLOCK, in_features // pair, pair).copy_(blocks.transpose(1, 2))
    return plain
