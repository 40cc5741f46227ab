"""CodedWeight: a projection's weight of which all, or some outputs, are in codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol

import torch

from quire.errors import ModelLoadError
from quire.kernels.quantized import Outliers, QuantizedWeight, concatenate
from quire.kernels.reference.quantized import dequantize
from quire.models.cut import Cut

Piece = QuantizedWeight | torch.Tensor
"""Consecutive outputs of a projection: in codes, or plain ``[num_rows, in_features]``."""


class Packed(Protocol):
    """Codes in the order of some kernels, which is all that is kept of them."""

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""

    def read(self) -> QuantizedWeight:
        """Return the weight that was packed."""

    def matrix(self, bias: torch.Tensor | None = None) -> Any:
        """Describe it to those kernels, with a bias ``[out_features]``."""


class CodedWeight:
    """A weight ``[out_features, in_features]`` in pieces, as few as there can be.

    Attributes
    ----------
    cuts : tuple of int
        Outputs of each stretch that is to be a matrix of its own for the native kernels.
    kinds : frozenset of str
        Of the codes.

    Parameters
    ----------
    pieces
        In the order of their outputs; all on one device.
    cuts
        Their sum is the number of outputs.
    """

    def __init__(self, pieces: Sequence[Piece], cuts: Sequence[int]) -> None:
        self.cuts = tuple(cuts)
        self.kinds = frozenset(each.kind for each in pieces if isinstance(each, QuantizedWeight))
        self._stretches: list[list[Piece | Packed]] = []
        first = 0
        for size in self.cuts:
            self._stretches.append(list(_joined(_between(pieces, first, first + size))))
            first += size

    @property
    def pieces(self) -> list[Piece]:
        """All pieces, unpacked."""
        return [_plain(piece) for stretch in self._stretches for piece in stretch]

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return sum(_num_bytes(piece) for stretch in self._stretches for piece in stretch)

    @property
    def out_features(self) -> int:
        """Rows."""
        return sum(self.cuts)

    def pack(self, pack: Callable[[QuantizedWeight], Packed | None]) -> None:
        """Bring codes into the order of some kernels, wherever a stretch is of one piece.

        Where `pack` returns None, they stay as they are.
        """
        for stretch in self._stretches:
            if len(stretch) == 1 and isinstance(stretch[0], QuantizedWeight):
                stretch[0] = pack(stretch[0]) or stretch[0]

    def unpack(self) -> None:
        """Undo `pack`."""
        for stretch in self._stretches:
            stretch[:] = [_plain(piece) for piece in stretch]

    def matrices(self) -> list[Packed | torch.Tensor] | None:
        """Return one matrix for each of the cuts; None where there are more, or not packed."""
        found: list[Packed | torch.Tensor] = []
        for stretch in self._stretches:
            [*others, last] = stretch
            if others or isinstance(last, QuantizedWeight):
                return None
            found.append(last)
        return found

    def matrix(self, first: int) -> Packed | torch.Tensor:
        """Return the matrix of the cut that begins at an output."""
        found = self.matrices()
        assert found is not None
        return found[[0, *accumulate(self.cuts)].index(first)]

    def read(self, plain: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Return the weight in plain numbers, float32 on the CPU; a copy.

        Parameters
        ----------
        plain
            What brings a plain piece into plain order; None: it is.
        """
        return torch.cat(
            [
                (piece if plain is None else plain(piece)).to("cpu", torch.float32)
                if isinstance(piece, torch.Tensor)
                else dequantize(on_device(piece, torch.device("cpu")))
                for piece in self.pieces
            ]
        )


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """Return a weight whose tensors are all on a device; itself if they are."""
    if weight.codes.device == device:
        return weight
    outliers = weight.outliers
    if outliers is not None:
        outliers = Outliers(
            outliers.first.to(device), outliers.columns.to(device), outliers.values.to(device)
        )

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(
        weight,
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zeros=moved(weight.zeros),
        order=moved(weight.order),
        input_factors=moved(weight.input_factors),
        table=moved(weight.table),
        outliers=outliers,
    )


def share_of_codes(weight: QuantizedWeight, cut: Cut, part: str) -> QuantizedWeight:
    """Return what is here of a weight, or of a part of one; a copy, unless that is all.

    Raises
    ------
    ModelLoadError
        Inputs are cut between two that have a scale in common.
    """
    if cut.rows is not None:
        weight = weight.select(cut.index(part).to(weight.codes.device))
    if cut.columns is not None:
        _check_groups(weight, cut.columns)
        weight = weight.columns(cut.columns.start, cut.columns.stop)
    return weight


def _check_groups(weight: QuantizedWeight, columns: range) -> None:
    """See that a cut is where a group begins; with an order, groups are scattered anyway."""
    width, size = weight.in_features, weight.group_size
    if weight.order is not None or size >= width:
        return
    if columns.start % size == 0 and (columns.stop % size == 0 or columns.stop == width):
        return
    ways = width // len(columns)
    good = [n for n in range(1, width // size + 1) if width % n == 0 and width // n % size == 0]
    raise ModelLoadError(
        f"is in groups of {size} columns, which tensor_parallel_size={ways} would cut: it gives "
        f"each rank {len(columns)} of {width}; {', '.join(map(str, good or [1]))} would do"
    )


def _plain(piece: Piece | Packed) -> Piece:
    return piece if isinstance(piece, QuantizedWeight | torch.Tensor) else piece.read()


def _num_bytes(piece: Piece | Packed) -> int:
    return piece.nbytes if isinstance(piece, torch.Tensor) else piece.num_bytes


def _rows_of(piece: Piece) -> int:
    return len(piece) if isinstance(piece, torch.Tensor) else piece.out_features


def _between(pieces: Sequence[Piece], first: int, end: int) -> list[Piece]:
    """The pieces, or parts of them, that have the outputs from `first` to `end`."""
    found: list[Piece] = []
    offset = 0
    for piece in pieces:
        size = _rows_of(piece)
        low, high = max(first - offset, 0), min(end - offset, size)
        if low < high:
            if (low, high) == (0, size):
                found.append(piece)
            elif isinstance(piece, torch.Tensor):
                found.append(piece[low:high])
            else:
                found.append(piece.rows(low, high))
        offset += size
    return found


def _joined(pieces: list[Piece]) -> list[Piece]:
    """As few pieces as can be: neighbours in codes of the same kind become one."""
    codes = [piece for piece in pieces if isinstance(piece, QuantizedWeight)]
    if len(codes) == len(pieces) and (whole := concatenate(codes)) is not None:
        return [whole]
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        both = None
        if isinstance(last, QuantizedWeight) and isinstance(piece, QuantizedWeight):
            both = concatenate([last, piece])
        if both is None:
            joined.append(piece)
        else:
            joined[-1] = both
    return joined
