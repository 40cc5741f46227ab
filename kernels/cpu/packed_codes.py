"""PackedCodes: a weight in codes, in the blocks that the native products read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from quire.kernels.cpu import structs
from quire.kernels.quantized import QuantizedWeight, concatenate

_LINE = 64
_MOST_UNIT = 128
_LONG_UNITS = (256, 192)
"""Of integers under one scale that are zero at 0: more would not fit sums of 32 bits."""
_TABLE_UNITS = (256, 128, 64)
"""Of entries of tables under one scale: multiples of 64, which is what tiles take."""
_TABLE_STEP = 128
"""What these are a multiple of, where tables are bfloat16."""
_TILES = ("amx", "amx-emulated")
"""Instruction sets with tiles of bfloat16."""
_TABLE_BYTES = 4 + 2 * 16
"""Of an output's table in its block: a scale, and entries of 16 bits."""
_HALF_BYTES = ("int4", "table4")
_FLOATS = ("fp8", "table4")
_SUBNORMAL_SHARE = 1e-3
"""Of fp8 codes. Arithmetic with a subnormal number costs a CPU a hundred times what others do."""
_PANEL = 1 << 20
"""Codes that are looked at at once."""
_SCALE_LIMIT = 128.0
"""Of fp8 codes, whose values are read as numbers 2^-120 as large."""


def unit_of(weight: QuantizedWeight) -> int:
    """Return how many columns the kernels sum up before they scale: a group, or a part of one.

    Raises
    ------
    ValueError
        The groups are of a size that has no such part.
    """
    if weight.scales.shape[1] == 1:
        if weight.kind == "table4":
            return _longest(weight.in_features, _TABLE_UNITS)
        units = [min(_MOST_UNIT, weight.in_features + -weight.in_features % 8)]
        if weight.kind not in _FLOATS and weight.zeros is None:
            units += _LONG_UNITS
        return _longest(weight.in_features, units)
    for unit in range(_MOST_UNIT, 0, -8):
        if weight.group_size % unit == 0:
            return unit
    raise ValueError(
        f"groups of {weight.group_size} columns; the native kernels take multiples of 8, or one "
        "group for all"
    )


def _longest(in_features: int, units: Sequence[int]) -> int:
    """Return the longest of those that fill up least, for that is read, too."""
    return min(units, key=lambda unit: (-(-in_features // unit) * unit, -unit))


def _goes_by_bfloat16_tables(library: ctypes.CDLL, weight: QuantizedWeight) -> bool:
    """Whether the library multiplies bfloat16 tables of outputs, with their scales in them."""
    isa: bytes = library.quire_isa()
    per_output = weight.table is not None and weight.table.dim() == 2
    return per_output and weight.scales.shape[1] == 1 and isa.decode() in _TILES


class PackedCodes:
    """A copy of a weight's codes in blocks of 16 outputs, with what the kernels need besides.

    Parameters
    ----------
    library
        From :func:`quire.kernels.cpu.library.load_library`.
    weight : QuantizedWeight
        On the CPU. Its order, factors, tables and outliers are kept, its codes and scales are not.
    allocate : function, optional
        Returns a tensor of so many bytes, uint8; by default ``torch.empty``.
    rounds_inputs : bool, optional
        Whether inputs may be rounded to bfloat16, as those of plain weights in bfloat16 are; it is
        done where that is faster: by AMX, of fp8 codes and of tables of outputs under one scale,
        whose entries times that scale are then rounded so, too.

    Attributes
    ----------
    out_features, in_features : int
    num_bytes : int
        Memory that it takes.
    rounds_inputs : bool

    Raises
    ------
    ValueError
        The kernels do not know such groups, such scales, or outliers or factors beside such codes.
    MemoryError
        There is not enough memory.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: QuantizedWeight,
        allocate: Callable[[int], torch.Tensor] | None = None,
        *,
        rounds_inputs: bool = False,
    ) -> None:
        if weight.outliers is not None and weight.kind not in _FLOATS:
            raise ValueError(
                f"outliers beside {weight.kind}; the native kernels take them beside "
                f"{' and '.join(_FLOATS)}"
            )
        if weight.activations != "float" and weight.input_factors is not None:
            raise ValueError("inputs that are rounded to 8 bits cannot have factors as well")
        if weight.kind == "fp8" and bool((weight.scales.abs() >= _SCALE_LIMIT).any()):
            raise ValueError(f"a scale of fp8 codes reaches {_SCALE_LIMIT:g}")
        self._library = library
        unit = unit_of(weight)
        has_bfloat16_tables = rounds_inputs and _goes_by_bfloat16_tables(library, weight)
        if has_bfloat16_tables:
            unit = max(unit, _TABLE_STEP)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        num_groups = weight.scales.shape[1]
        self._units_per_group = 1 if num_groups == 1 else weight.group_size // unit
        # What a row has of everything else stays with the weight's description.
        # Of no rows by a list, and not by a slice: a view would keep all of them.
        self._rest = weight.select(torch.empty(0, dtype=torch.int64, device="cpu"))
        self._beside = replace(
            weight,
            codes=weight.codes.new_empty(weight.out_features, 0),
            scales=weight.scales.new_empty(weight.out_features, 0),
            zeros=None,
        )
        self._num_groups = num_groups
        self._has_zeros = weight.zeros is not None
        half = weight.kind in _HALF_BYTES
        scales = structs.BLOCK * (4 + 2 * self._has_zeros)
        num_units = -(-weight.in_features // unit)
        self._block_bytes = scales * (num_units if num_groups > 1 else 1)
        self._block_bytes += num_units * unit * structs.BLOCK // (2 if half else 1)
        if weight.table is not None and weight.table.dim() == 2:
            self._block_bytes += structs.BLOCK * _TABLE_BYTES
        num_blocks = -(-weight.out_features // structs.BLOCK)
        size = num_blocks * self._block_bytes + _LINE
        if allocate is None:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        else:
            memory = allocate(size)
        first = -memory.data_ptr() % _LINE
        self._blocks = memory[first : first + num_blocks * self._block_bytes]
        self._kept: list[torch.Tensor] = []
        self._codes = self._describe(weight, unit)
        self._codes.has_bfloat16_tables = has_bfloat16_tables
        self._codes.rounds_to_bfloat16 = self.rounds_inputs = rounds_inputs
        self.num_bytes = memory.nbytes + sum(each.nbytes for each in self._kept)
        self._convert(library.quire_pack_codes, weight, self._blocks)

    def _describe(self, weight: QuantizedWeight, unit: int) -> structs.Codes:
        order = factors = None
        if weight.order is not None:
            order = self._keep(weight.order.to(torch.int32))
        if weight.input_factors is not None:
            by_column = weight.input_factors
            if weight.order is not None:
                by_column = by_column[weight.order]
            factors = self._keep(by_column.float())
        codes = structs.Codes()
        codes.unit, codes.block_bytes = unit, self._block_bytes
        codes.scales_units = self._num_groups > 1
        codes.has_zeros = self._has_zeros
        codes.order, codes.factors = order, factors
        codes.rounds_to_int8 = weight.activations == "int8"
        codes.activation_scale = weight.activation_scale or 0.0
        self._describe_floats(weight, codes)
        return codes

    def _describe_floats(self, weight: QuantizedWeight, codes: structs.Codes) -> None:
        if weight.kind == "fp8":
            subnormal = 0
            step = 1 + _PANEL // weight.in_features
            for first in range(0, weight.out_features, step):
                digits = weight.codes[first : first + step].view(torch.uint8) & 0x7F
                subnormal += int(((digits > 0) & (digits < 8)).sum())
            codes.has_subnormals = subnormal > _SUBNORMAL_SHARE * weight.codes.numel()
        if weight.table is not None:
            table = weight.table.float()
            codes.has_tables = table.dim() == 2
            if codes.has_tables:
                table = F.pad(table, (0, 0, 0, -weight.out_features % structs.BLOCK))
                self._beside = replace(self._beside, table=table[: weight.out_features])
            codes.tables = self._keep(table)
        if weight.outliers is None:
            return
        columns = weight.outliers.columns
        if weight.order is not None:
            place = torch.empty_like(weight.order)
            place[weight.order] = torch.arange(weight.in_features, device="cpu")
            columns = place[columns.long()]
        codes.outlier_first = self._keep(weight.outliers.first)
        codes.outlier_columns = self._keep(columns.to(torch.int32))
        codes.outlier_values = self._keep(weight.outliers.values)

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _convert(
        self, convert: Callable[..., int], weight: QuantizedWeight, blocks: torch.Tensor
    ) -> None:
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zeros is None else weight.zeros.contiguous()
        packing = structs.CodesPacking(
            codes.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            blocks.data_ptr(),
            self.in_features,
            weight.out_features,
            codes.shape[1],
            self._num_groups,
            self._units_per_group,
            structs.CODES[weight.kind],
            ctypes.addressof(self._codes),
        )
        if convert(ctypes.byref(packing), torch.get_num_threads()):
            raise MemoryError("no memory for a weight in codes")

    def matrix(self, bias: torch.Tensor | None = None) -> structs.Matrix:
        """Describe the weight to the library.

        Parameters
        ----------
        bias : Tensor[out_features], optional
            Copied.

        Returns
        -------
        structs.Matrix
            Good for as long as this object lives.
        """
        padded = None
        if bias is not None:
            padded = self._keep(F.pad(bias.float(), (0, -self.out_features % structs.BLOCK)))
        return structs.Matrix(
            self._blocks.data_ptr(),
            None,
            padded,
            self.in_features,
            self.out_features,
            structs.CODES[self._rest.kind],
            ctypes.addressof(self._codes),
        )

    def is_like(self, other: PackedCodes) -> bool:
        """Whether one pass over the same inputs can multiply both: as a gate and what it lets by.

        That is so if their inputs are brought into the same order and rounded alike, and their
        blocks are laid out alike.
        """
        return (
            self._has_zeros == other._has_zeros
            and self._codes.has_bfloat16_tables == other._codes.has_bfloat16_tables
            and concatenate([self._rest, other._rest]) is not None
        )

    def read(self) -> QuantizedWeight:
        """Return the weight as it was given."""
        weight = self._read(self._blocks, self.out_features)
        return replace(weight, table=self._beside.table, outliers=self._beside.outliers)

    def rows(self, ids: torch.Tensor) -> QuantizedWeight:
        """Return some outputs, as `QuantizedWeight.select` would.

        Parameters
        ----------
        ids : Tensor[num_rows], int64
        """
        found = self._blocks.view(-1, self._block_bytes)[ids // structs.BLOCK]
        places = torch.arange(len(ids), device="cpu") * structs.BLOCK + ids % structs.BLOCK
        weight = self._read(found, len(ids) * structs.BLOCK).select(places)
        beside = self._beside.select(ids)
        return replace(weight, table=beside.table, outliers=beside.outliers)

    def _read(self, blocks: torch.Tensor, out_features: int) -> QuantizedWeight:
        rest = self._rest
        weight = QuantizedWeight(
            kind=rest.kind,
            codes=rest.codes.new_empty(out_features, rest.codes.shape[1]),
            scales=rest.scales.new_empty(out_features, self._num_groups),
            in_features=rest.in_features,
            group_size=rest.group_size,
            zeros=None
            if rest.zeros is None
            else rest.zeros.new_empty(out_features, self._num_groups),
            order=rest.order,
            input_factors=rest.input_factors,
            activations=rest.activations,
            activation_scale=rest.activation_scale,
        )
        self._convert(self._library.quire_unpack_codes, weight, blocks)
        return weight
