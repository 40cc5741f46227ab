"""Rows of the KV cache: how a key or a value of one head lies in it.

As it is, in one of the three float types. Or in codes of one byte, of the type int8 or
float8_e4m3fn, with a float32 scale of its own in its last four bytes: a row of `head_dim` codes is
``head_dim + 4`` elements long. What it stands for is ``code * scale``.
"""

from __future__ import annotations

import torch

LARGEST_CODE = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""The types of codes, each with the code that the largest element of a row gets."""

SCALE_BYTES = 4


def is_coded(dtype: torch.dtype) -> bool:
    """Whether a KV cache of that type holds codes and their scales."""
    return dtype in LARGEST_CODE


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Return how many elements of `dtype` a key or a value of one head takes."""
    return head_dim + SCALE_BYTES if is_coded(dtype) else head_dim
