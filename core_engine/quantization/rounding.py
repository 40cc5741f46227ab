"""Plain weights rounded to codes: every code is the nearest one, under scales that fit the group.

Weights are taken panel by panel, small enough for a core's cache: what is needed beside the result
is a few of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quire.errors import ModelLoadError
from quire.kernels.quantized import Activations, QuantizedWeight
from quire.quantization.bits import halves

_PANEL_SIZE = 1 << 18
"""Elements that are rounded at once: 1 MiB."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Quotients by anything smaller lose their digits."""

_CLIPPED = (0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's range that a search tries beside the whole."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 4-bit NormalFloat (Dettmers et al., arXiv:2305.14314, appendix E)."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the values of a group of columns may lie: 16 codes.

    Attributes
    ----------
    group_size
        Columns that share a scale; the last group may have fewer.
    symmetric
        Whether zero is code 8, and not any.
    clip
        Whether ranges are searched that cut off the group's largest values for finer steps.
    scale_dtype
        What scales are rounded to, before codes are chosen: files keep them in fewer bytes.
    lowest_zero
        The smallest code that may stand for zero; 1 where a format has no room for 0.
    """

    group_size: int
    symmetric: bool = False
    clip: bool = True
    scale_dtype: torch.dtype = torch.float32
    lowest_zero: int = 0


class Groups(NamedTuple):
    """Codes of some groups of columns.

    Attributes
    ----------
    codes : Tensor[rows, num_groups, group_size], float32
        Integers from 0 to 15.
    scales, zeros : Tensor[rows, num_groups], float32
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def panels(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a weight from each first one on, copied to float32.

    Raises
    ------
    ModelLoadError
        A value is no number, or none in float32; the message goes on after the weight's name.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.dim() != 2:
        raise ModelLoadError(
            f"has the dtype {str(weight.dtype).removeprefix('torch.')} and the shape "
            f"{list(weight.shape)}; what is quantized is a matrix of float16, bfloat16, float32 "
            "or float64"
        )
    if not weight.numel():
        raise ModelLoadError(f"has the shape {list(weight.shape)}; there is nothing to quantize")
    height = max(1, _PANEL_SIZE // weight.shape[1])
    for first in range(0, weight.shape[0], height):
        rows = weight[first : first + height]
        panel = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.stack(panel.aminmax()).isfinite().all():
            row, column = (~panel.isfinite()).nonzero()[0].tolist()
            raise ModelLoadError(
                f"has the value {rows[row, column].item()} in row {first + row}, column {column}; "
                "only values that are finite in float32 can be quantized"
            )
        yield first, panel


def _usable(scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales that can be divided by, as they will be kept; 1 for groups of zeros."""
    kind = torch.finfo(dtype)
    # Below the smallest normal number digits are lost: four bits of them have to be left.
    smallest = max(_SMALLEST_SCALE, 16 * kind.tiny * kind.eps)
    if dtype != torch.float32 and (largest := scales.max().item()) > kind.max:
        raise ModelLoadError(
            f"needs a scale of {largest:g}, and scales are kept in "
            f"{str(dtype).removeprefix('torch.')}, which goes to {kind.max:g}"
        )
    return torch.where(scales == 0, 1.0, scales.clamp(min=smallest).to(dtype).float())


def round_int8(
    weight: torch.Tensor,
    activations: Activations = "float",
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Round a weight to 8 bits, symmetrically, with one scale per output.

    Parameters
    ----------
    weight : Tensor[out_features, in_features]
        Finite.
    activations
        See `QuantizedWeight.activations`.
    scale_dtype
        What scales are rounded to first.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1)
    for first, panel in panels(weight):
        scale = _usable(panel.abs().amax(1, keepdim=True) / 127, scale_dtype)
        codes[first : first + len(panel)] = panel.div_(scale).round_().clamp_(-127, 127)
        scales[first : first + len(panel)] = scale
    size = weight.shape[1]
    return QuantizedWeight("int8", codes, scales, size, size, activations=activations)


def round_fp8(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Round a weight to float8_e4m3fn, with one scale per output; see `round_int8`."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(weight.shape[0], 1)
    for first, panel in panels(weight):
        scale = _usable(panel.abs().amax(1, keepdim=True) / 448, scale_dtype)
        codes[first : first + len(panel)] = panel.div_(scale).clamp_(-448, 448)
        scales[first : first + len(panel)] = scale
    size = weight.shape[1]
    return QuantizedWeight("fp8", codes, scales, size, size)


def round_nf4(weight: torch.Tensor, group_size: int = 64) -> QuantizedWeight:
    """Round a weight to the 4-bit NormalFloat, with a scale for each `group_size` columns."""
    table = torch.tensor(NF4)
    borders = (table[1:] + table[:-1]) / 2
    num_columns = weight.shape[1]
    codes = torch.empty(weight.shape[0], (num_columns + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(weight.shape[0], -(-num_columns // group_size))
    for first, panel in panels(weight):
        grouped = split_groups(panel, group_size)
        scale = _usable(grouped.abs().amax(2))
        found = torch.bucketize(grouped.div(scale[..., None]), borders, out_int32=True)
        end = first + len(panel)
        codes[first:end] = halves(found.flatten(1)[:, :num_columns].to(torch.uint8))
        scales[first:end] = scale
    return QuantizedWeight("table4", codes, scales, num_columns, group_size, table=table)


def round_int4(
    weight: torch.Tensor,
    grid: Grid,
    factors: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to 4 bits, group by group of its columns.

    Parameters
    ----------
    weight : Tensor[out_features, in_features]
        Finite.
    grid
        The groups, and what their codes may mean.
    factors : Tensor[in_features], optional
        What inputs will be multiplied with: columns are divided by it first.
    importance : Tensor[in_features], optional
        How much a column's squared error counts (the mean square of its input) in the search of
        ranges; by input, before `factors`.
    """
    num_columns = weight.shape[1]
    group_size = min(grid.group_size, max(num_columns, 1))
    num_groups = -(-num_columns // group_size)
    codes = torch.empty(weight.shape[0], (num_columns + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(weight.shape[0], num_groups)
    zeros = torch.empty(weight.shape[0], num_groups, dtype=torch.int16)
    weights = None
    if importance is not None:
        if factors is not None:
            importance = importance * factors.square()
        weights = split_groups(importance[None], group_size)
    for first, panel in panels(weight):
        if factors is not None:
            panel /= factors
        found = fit_groups(split_groups(panel, group_size), grid, weights)
        end = first + len(panel)
        codes[first:end] = halves(found.codes.flatten(1)[:, :num_columns].to(torch.uint8))
        scales[first:end] = found.scales
        zeros[first:end] = found.zeros
    return QuantizedWeight(
        "int4",
        codes,
        scales,
        num_columns,
        group_size,
        zeros=None if grid.symmetric else zeros,
        input_factors=factors,
    )


def split_groups(panel: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return ``[rows, num_groups, group_size]``; what the last group lacks is 0."""
    missing = -panel.shape[1] % group_size
    if missing:
        panel = F.pad(panel, (0, missing))
    return panel.view(len(panel), -1, group_size)


def fit_groups(values: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Groups:
    """Choose the scales and zeros of groups, and the codes.

    Parameters
    ----------
    values : Tensor[rows, num_groups, group_size], float32
        Not changed.
    grid
        Its ``group_size`` is the last axis.
    importance : Tensor[1, num_groups, group_size], optional
        How much squared errors count; None: all the same.
    """
    # Zero is always in the range: it has a code of its own, exactly.
    low, high = values.amin(2).clamp_(max=0), values.amax(2).clamp_(min=0)
    if grid.symmetric:
        high = torch.maximum(high, -low)
        steps = 7.0
    else:
        # Not their difference, which float32 may not hold.
        steps = 15.0
    work = torch.empty_like(values)

    def fit(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        if grid.symmetric:
            scale = _usable(high * (share / steps), grid.scale_dtype)
            return scale, torch.full_like(scale, 8)
        scale = _usable(high * (share / steps) - low * (share / steps), grid.scale_dtype)
        return scale, (low * -share).div_(scale).round_().clamp_(grid.lowest_zero, 15)

    def encode(scale: torch.Tensor, zero: torch.Tensor) -> None:
        torch.div(values, scale[..., None], out=work)
        work.round_().add_(zero[..., None]).clamp_(0, 15)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        encode(scale, zero)
        work.sub_(zero[..., None]).mul_(scale[..., None]).sub_(values).square_()
        if importance is not None:
            work.mul_(importance)
        return work.sum(2)

    scales, zeros = fit(1.0)
    if grid.clip:
        least = error(scales, zeros)
        for share in _CLIPPED:
            other_scales, other_zeros = fit(share)
            other = error(other_scales, other_zeros)
            better = other < least
            scales = torch.where(better, other_scales, scales)
            zeros = torch.where(better, other_zeros, zeros)
            least = torch.where(better, other, least)
    encode(scales, zeros)
    return Groups(work, scales, zeros)
