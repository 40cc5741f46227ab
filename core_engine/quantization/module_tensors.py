"""What the tensors of a quantized module have to be; messages name the kind, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quire.errors import ModelLoadError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as messages show it."""
    return str(dtype).removeprefix("torch.")


def tensor_of(
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    dtypes: tuple[torch.dtype, ...],
    *shapes: tuple[int, ...],
    hint: str = "",
) -> torch.Tensor:
    """Return one of a module's tensors.

    Parameters
    ----------
    tensors
        By kind.
    kind
        The one that is wanted.
    dtypes
        What it may have.
    shapes
        What it may have; none given: any.
    hint
        What the message about another dtype ends with.

    Raises
    ------
    ModelLoadError
        It is missing, or has another type or shape.
    """
    tensor = tensors.get(kind)
    if tensor is None:
        raise ModelLoadError(f"{kind} is missing; there are {', '.join(sorted(tensors))}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(name_of, dtypes))
        raise ModelLoadError(
            f"{kind} has the dtype {name_of(tensor.dtype)}, {wanted} is needed"
            + (f"; {hint}" if hint else "")
        )
    if shapes and tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ModelLoadError(f"{kind} has the shape {list(tensor.shape)}, {wanted} is needed")
    return tensor


def finite(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in float32, which must have values, and only finite ones.

    Raises
    ------
    ModelLoadError
        It is empty, or has NaN or an infinity, perhaps only in float32.
    """
    if not tensor.numel():
        raise ModelLoadError(f"{kind} has the shape {list(tensor.shape)}, which holds no value")
    copy = tensor.to(torch.float32, copy=True)
    bad = ~copy.isfinite()
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise ModelLoadError(
            f"{kind} has {copy[tuple(index)].item()} at {index}, finite values are needed"
        )
    return copy


def positive_scalar(tensors: Mapping[str, torch.Tensor], kind: str) -> float:
    """Return the only value of a tensor, which must be finite and above 0.

    Raises
    ------
    ModelLoadError
        It is missing, or no such number.
    """
    value = finite(kind, tensor_of(tensors, kind, FLOATS))
    if value.numel() != 1 or value.item() <= 0:
        found = value.item() if value.numel() == 1 else f"the shape {list(value.shape)}"
        raise ModelLoadError(f"{kind} has {found}, one value above 0 is needed")
    return value.item()


def no_nan_codes(kind: str, codes: torch.Tensor) -> torch.Tensor:
    """Return a copy of float8_e4m3fn codes, of which none may be NaN.

    Raises
    ------
    ModelLoadError
        One is.
    """
    copy = codes.clone(memory_format=torch.contiguous_format)
    if (bad := (copy.view(torch.uint8) & 0x7F) == 0x7F).any():
        index = bad.nonzero()[0].tolist()
        raise ModelLoadError(f"{kind} has NaN at {index}, numbers are needed")
    return copy


def is_zero(tensor: torch.Tensor) -> bool:
    """Whether all values are 0."""
    return not bool((tensor.float() != 0).any())


def over_blocks(
    kind: str, scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]
) -> torch.Tensor:
    """Return the scales of blocks of outputs and inputs, for each output.

    Parameters
    ----------
    kind
        For messages.
    scales : Tensor[ceil(out_features / height), ceil(in_features / width)]
    shape
        ``(out_features, in_features)``.
    block
        ``(height, width)``.

    Returns
    -------
    Tensor[out_features, ceil(in_features / width)]

    Raises
    ------
    ModelLoadError
        `scales` has another shape.
    """
    wanted = [-(-shape[0] // block[0]), -(-shape[1] // block[1])]
    if list(scales.shape) != wanted:
        raise ModelLoadError(
            f"{kind} has the shape {list(scales.shape)}, {wanted} is needed: one for each "
            f"{block[0]} by {block[1]} block of a weight of {shape[0]} by {shape[1]}"
        )
    height = min(block[0], shape[0])
    return scales.repeat_interleave(height, 0)[: shape[0]].contiguous()
