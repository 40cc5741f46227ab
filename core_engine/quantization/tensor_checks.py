"""Checks of a quantized module's tensors: each names the kind, what it has, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quire.errors import ModelLoadError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Types that scales and tables may have."""


def taken(
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    why: str,
) -> torch.Tensor:
    """Return a tensor after a look at its type and shape.

    Parameters
    ----------
    tensors
        Of the module, by kind.
    kind
        The one that is wanted.
    dtypes
        Types that it may have.
    shape
        What it must have.
    why
        What the shape is made of, such as ``"in_features 64, 4 bits"``.

    Raises
    ------
    ModelLoadError
        It is missing, of another type, or of another shape.
    """
    tensor = tensors.get(kind)
    if tensor is None:
        raise ModelLoadError(f"{kind} is missing")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        has = str(tensor.dtype).removeprefix("torch.")
        raise ModelLoadError(f"{kind} is of type {has}; it must be {names}")
    if tuple(tensor.shape) != shape:
        raise ModelLoadError(
            f"{kind} has the shape {list(tensor.shape)}; it must be {list(shape)}: {why}"
        )
    return tensor


def finite(kind: str, values: torch.Tensor) -> torch.Tensor:
    """Return values, none of which may be infinite or no number.

    Raises
    ------
    ModelLoadError
        One is.
    """
    good = torch.isfinite(values)
    if not good.all():
        count = int((~good).sum())
        raise ModelLoadError(
            f"{kind} has {count} of {values.numel()} values that are infinite or not a number; "
            "all must be finite. The file is damaged, or its quantization went wrong"
        )
    return values


def num_groups(in_features: int, group_size: int) -> int:
    """Return how many groups the inputs have.

    Raises
    ------
    ModelLoadError
        The group size does not divide the inputs.
    """
    if group_size == -1:
        return 1
    if in_features % group_size:
        raise ModelLoadError(
            f"group_size {group_size} does not divide its {in_features} inputs; a group size that "
            "does would work, or -1"
        )
    return in_features // group_size
