"""QuantizedWeight: the weight of a projection in codes of few bits, whatever format it came in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["int8", "int4", "fp8", "table4"]
"""How codes are kept, and what they mean.

- ``int8``: int8 ``[out, in]``; the value is ``code - zero``, the zero being 0 unless given.
- ``int4``: uint8 ``[out, (in + 1) // 2]``, the even column in the low half; codes are 0 to 15,
  the value is ``code - zero``, the zero being 8 unless given. So are codes of 2 and 3 bits kept.
- ``fp8``: float8_e4m3fn ``[out, in]``; the code is the value.
- ``table4``: as ``int4``; the value is the code's entry in a table.
"""

Activations = Literal["float", "int8"]


@dataclass(frozen=True, slots=True, eq=False)
class Outliers:
    """Values that are added to some places of a weight: a sparse matrix in rows (CSR).

    Attributes
    ----------
    first : Tensor[out_features + 1], int64
        Where each output's entries begin.
    columns : Tensor[num_entries], int32
        Their inputs, ascending within an output.
    values : Tensor[num_entries], float32
    """

    first: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight ``[out_features, in_features]`` in codes.

    ``weight[o, order[k]] = value(codes[o, k]) * scales[o, k // group_size]``, plus the outliers
    at their places, times ``input_factors`` of the input. `quire.kernels.reference.quantized` has
    that in plain torch.

    Attributes
    ----------
    kind : {"int8", "int4", "fp8", "table4"}
        See `Kind`.
    codes : Tensor
        On the CPU or a GPU, as are all others.
    scales : Tensor[out_features, num_groups], float32
        Finite; ``num_groups = ceil(in_features / group_size)``.
    in_features : int
    group_size : int
        Columns that share a scale; the last group may have fewer. ``in_features`` or more: one
        scale per output.
    zeros : Tensor[out_features, num_groups], int16, optional
        ``int8`` and ``int4`` only. Any integer from -256 to 256.
    order : Tensor[in_features], int64, optional
        Which input each column is of; None: columns are inputs.
    input_factors : Tensor[in_features], float32, optional
        By input, not by column; what ``x`` is multiplied with first.
    table : Tensor[16] or Tensor[out_features, 16], float32, optional
        ``table4`` only. All entries are finite, also those that no code uses.
    outliers : Outliers, optional
    activations : {"float", "int8"}
        ``"int8"``: the weight is to be multiplied with inputs that are rounded to 8 bits, which is
        part of what the format means: to ``round(x / s)`` with ``s`` a 127th of the row's largest
        size, or `activation_scale`.
    activation_scale : float, optional
        The step of these, where it is fixed; inputs are cut off at -128 and 127 of them.
    """

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor
    in_features: int
    group_size: int
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None
    input_factors: torch.Tensor | None = None
    table: torch.Tensor | None = None
    outliers: Outliers | None = None
    activations: Activations = "float"
    activation_scale: float | None = None

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that there are, by attribute."""
        found = {
            name: getattr(self, name)
            for name in ("codes", "scales", "zeros", "order", "input_factors", "table")
        }
        if self.outliers is not None:
            for name in ("first", "columns", "values"):
                found[f"outliers.{name}"] = getattr(self.outliers, name)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def rows(self, first: int, end: int) -> QuantizedWeight:
        """Return some outputs; tensors are views where they can be."""
        return self.select(slice(first, end))

    def select(self, index: slice | torch.Tensor) -> QuantizedWeight:
        """Return the outputs of an index, in its order."""
        outliers = None
        if self.outliers is not None:
            outliers = _select_outliers(self.outliers, index)
        per_output = self.table is not None and self.table.dim() == 2
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            table=self.table[index] if per_output and self.table is not None else self.table,
            outliers=outliers,
        )

    def columns(self, first: int, end: int) -> QuantizedWeight:
        """Return the weight of some inputs, which makes their share of every output.

        Groups stay what they are where the inputs begin and end with one. Elsewhere they are as
        long as the parts have in common that the cut, or the order, makes of them. With activations
        in ``"int8"`` that have no fixed step, shares are rounded by their own largest.

        Parameters
        ----------
        first, end : int
            Inputs, not columns.

        Raises
        ------
        ValueError
            There are no such inputs.
        """
        if not 0 <= first < end <= self.in_features:
            raise ValueError(f"inputs {first} to {end} of {self.in_features}")
        device = self.codes.device
        order = torch.arange(self.in_features, device=device) if self.order is None else self.order
        kept = ((order >= first) & (order < end)).nonzero()[:, 0]
        groups = kept // self.group_size
        starts = (groups[1:] != groups[:-1]).nonzero()[:, 0] + 1
        size = math.gcd(*starts.tolist()) or end - first
        return replace(
            self,
            codes=_select_codes(self, kept),
            scales=self.scales[:, groups[::size]],
            in_features=end - first,
            group_size=size,
            zeros=None if self.zeros is None else self.zeros[:, groups[::size]],
            order=None if self.order is None else self.order[kept] - first,
            input_factors=None if self.input_factors is None else self.input_factors[first:end],
            outliers=None if self.outliers is None else _outliers_of(self.outliers, first, end),
        )


def _select_codes(weight: QuantizedWeight, columns: torch.Tensor) -> torch.Tensor:
    if weight.kind == "fp8":
        return weight.codes.view(torch.uint8)[:, columns].view(weight.codes.dtype)
    if weight.kind == "int8":
        return weight.codes[:, columns]
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=2).flatten(1)[:, columns]
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _outliers_of(outliers: Outliers, first: int, end: int) -> Outliers:
    kept = (outliers.columns >= first) & (outliers.columns < end)
    before = torch.cat((kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)))
    return Outliers(before[outliers.first], outliers.columns[kept] - first, outliers.values[kept])


def _select_outliers(outliers: Outliers, index: slice | torch.Tensor) -> Outliers:
    first = outliers.first
    rows = torch.arange(len(first) - 1, device=first.device)[index]
    counts = (first[1:] - first[:-1])[rows]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int64, device=first.device)
    torch.cumsum(counts, 0, out=starts[1:])
    entry = torch.arange(int(starts[-1]), device=first.device)
    entry += (first[rows] - starts[:-1]).repeat_interleave(counts)
    return Outliers(starts, outliers.columns[entry], outliers.values[entry])


def concatenate(weights: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Return weights of the same input as one, their outputs in order.

    Returns
    -------
    QuantizedWeight or None
        None where they cannot be one: they differ in kind, groups, order or activations.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if not all(_fits(first, other) for other in weights[1:]):
        return None
    zeros = None
    if any(each.zeros is not None for each in weights):
        zeros = torch.cat([_zeros_of(each) for each in weights])
    table = first.table
    if table is not None and any(
        each.table is not None and (each.table.dim() == 2 or not torch.equal(each.table, table))
        for each in weights
    ):
        table = torch.cat(
            [
                each.table if each.table.dim() == 2 else each.table.expand(each.out_features, 16)
                for each in weights
                if each.table is not None
            ]
        )
    return replace(
        first,
        codes=torch.cat([each.codes for each in weights]),
        scales=torch.cat([each.scales for each in weights]),
        zeros=zeros,
        table=table,
        outliers=_join_outliers(weights),
    )


def _fits(first: QuantizedWeight, other: QuantizedWeight) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return torch.equal(a, b)

    return (
        first.kind == other.kind
        and first.in_features == other.in_features
        and first.scales.shape[1] == other.scales.shape[1]
        and min(first.group_size, first.in_features) == min(other.group_size, other.in_features)
        and equal(first.order, other.order)
        and equal(first.input_factors, other.input_factors)
        and first.activations == other.activations
        and first.activation_scale == other.activation_scale
    )


def _zeros_of(weight: QuantizedWeight) -> torch.Tensor:
    if weight.zeros is not None:
        return weight.zeros
    usual = 8 if weight.kind == "int4" else 0
    return torch.full_like(weight.scales, usual, dtype=torch.int16)


def _join_outliers(weights: list[QuantizedWeight]) -> Outliers | None:
    if all(each.outliers is None for each in weights):
        return None
    device = weights[0].codes.device
    counts, columns, values = [], [], []
    for each in weights:
        if each.outliers is None:
            counts.append(torch.zeros(each.out_features, dtype=torch.int64, device=device))
            continue
        counts.append(each.outliers.first.diff())
        columns.append(each.outliers.columns)
        values.append(each.outliers.values)
    starts = torch.zeros(1 + sum(map(len, counts)), dtype=torch.int64, device=device)
    torch.cumsum(torch.cat(counts), 0, out=starts[1:])
    return Outliers(starts, torch.cat(columns), torch.cat(values))
