"""What every format that is written asks of a weight."""

from __future__ import annotations

import torch

from quire.errors import UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight


def check_plain(weight: QuantizedWeight, name: str, kinds: tuple[str, ...]) -> None:
    """Check that a weight has nothing but codes, scales, zeros and an order.

    Parameters
    ----------
    weight
    name
        The format's, for messages.
    kinds
        Of codes that the format has.

    Raises
    ------
    UnsupportedModelError
        The format has no room for something that the weight has.
    """
    if weight.kind not in kinds:
        raise UnsupportedModelError(f"{name} has no codes of kind {weight.kind!r}")
    for part in ("input_factors", "table", "outliers"):
        if getattr(weight, part) is not None:
            raise UnsupportedModelError(f"{name} has no place for {part}")
    if weight.activations != "float":
        raise UnsupportedModelError(f"{name} does not round activations")
    size = weight.group_size
    if size < weight.in_features and weight.in_features % size:
        raise UnsupportedModelError(
            f"{name} needs a group size that divides the inputs; {size} does not divide "
            f"{weight.in_features}"
        )


def turned_scales(weight: QuantizedWeight, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return the scales ``[groups, out]`` in another type.

    Raises
    ------
    UnsupportedModelError
        The type cannot hold one.
    """
    scales = weight.scales.t().to(dtype).contiguous()
    if not bool(torch.isfinite(scales).all()):
        raise UnsupportedModelError(
            f"a scale of {float(weight.scales.abs().max()):g} is more than {name}'s "
            f"{str(dtype).removeprefix('torch.')} scales can be; write them as bfloat16"
        )
    return scales


def zeros_of(weight: QuantizedWeight) -> torch.Tensor:
    """Return the zeros that count, ``[out, groups]`` in int16."""
    if weight.zeros is not None:
        return weight.zeros
    usual = 8 if weight.kind == "int4" else 0
    return torch.full(weight.scales.shape, usual, dtype=torch.int16)


def check_range(values: torch.Tensor, bits: int, what: str, name: str) -> None:
    """Check that integers fit into unsigned codes.

    Raises
    ------
    UnsupportedModelError
        One does not.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << bits:
        raise UnsupportedModelError(
            f"{what} from {low} to {high} do not fit into {name}'s {bits} bits"
        )
