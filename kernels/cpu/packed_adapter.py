"""PackedAdapter: a LoRA adapter as the native library reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from quire.kernels.cpu import structs
from quire.kernels.cpu.blocks import dtype_of, padded_shape

_LINE = 64  # bytes: where each matrix begins


class Slice(Protocol):
    """Some outputs of a projection, and what makes their share."""

    @property
    def first_row(self) -> int:
        """The first output."""

    @property
    def first_rank(self) -> int:
        """The first of the ranks that it reads."""

    @property
    def b(self) -> torch.Tensor:
        """``[num_rows, rank]``."""


class Delta(Protocol):
    """What an adapter does to one projection.

    ``y = factor * (x @ weight.T + gain) + bias_of_the_model + bias``, where the gain of the rows of
    a slice is ``(scales * (x @ a.T))[its ranks] @ b.T``.
    """

    @property
    def a(self) -> torch.Tensor:
        """``[total_rank, in_features]``."""

    @property
    def scales(self) -> torch.Tensor:
        """``[total_rank]``."""

    @property
    def slices(self) -> Sequence[Slice]:
        """Of which no two have an output in common."""

    @property
    def bias(self) -> torch.Tensor | None:
        """``[out_features]``."""

    @property
    def factor(self) -> torch.Tensor | None:
        """``[out_features]``."""


class Embedding(Protocol):
    """What an adapter adds to embeddings: ``scale * a[id] @ b.T``."""

    @property
    def a(self) -> torch.Tensor:
        """``[vocab_size, rank]``."""

    @property
    def b(self) -> torch.Tensor:
        """``[embedding_size, rank]``."""

    @property
    def scale(self) -> float:
        """One for all ranks."""


@dataclass(frozen=True)
class PlacedDelta:
    """Some rows of a delta, and which of the library's deltas they are.

    Attributes
    ----------
    number : int
        Among ``structs.PROJECTIONS`` of each layer in turn; the output matrix comes last.
    delta : Delta
    first_row, num_rows : int
        All that the product has for outputs.
    shrinks : bool
        Whether inputs are shrunk for it; an up projection takes what its gate has them shrunk to.
    """

    number: int
    delta: Delta
    first_row: int
    num_rows: int
    shrinks: bool = True


class PackedAdapter:
    """Copies of an adapter's matrices, in blocks, and the structs that point to them.

    Making one runs beside anything else: it has no part in a step before its struct is in the
    model's table.

    Parameters
    ----------
    library
        From :func:`quire.kernels.cpu.library.load_library`.
    num_deltas : int
        Of the model: for each layer as many as ``structs.PROJECTIONS``, and one.
    placed : iterable of PlacedDelta
    embed : Tensor[vocab_size, embedding_size], optional
        Stands in for the model's; kept, not copied, if its dtype is float32 or bfloat16.
    embedding : Embedding, optional
    head : Tensor[vocab_size, embedding_size], optional
        Stands in for the model's output matrix.

    Attributes
    ----------
    struct : structs.Adapter
    head : structs.Matrix or None
    num_bytes : int
        Memory that it takes.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_deltas: int,
        placed: Iterable[PlacedDelta],
        *,
        embed: torch.Tensor | None = None,
        embedding: Embedding | None = None,
        head: torch.Tensor | None = None,
    ) -> None:
        parts = [_Part(each) for each in placed]
        self._kept: list[object] = []
        self._deltas = (structs.Delta * num_deltas)()
        matrices = [matrix for part in parts for matrix in part.matrices()]
        if head is not None:
            head = _factor(head)
            matrices.append(head)
        self._addresses: dict[int, int] = {}
        self.num_bytes = 0
        self._pack(library, matrices)
        for part in parts:
            self._deltas[part.number] = self._delta(part)
        self.head = None if head is None else self._matrix(head)
        none = structs.Matrix()
        self.struct = structs.Adapter(
            ctypes.addressof(self._deltas),
            max((padded_shape(part.a)[0] for part in parts if part.a is not None), default=0),
            none if embed is None else self._plain(embed),
            none if embedding is None else self._plain(embedding.a),
            none if embedding is None else self._plain(embedding.b.t().to(embedding.a.dtype)),
            0.0 if embedding is None else embedding.scale,
        )

    def _pack(self, library: ctypes.CDLL, matrices: list[torch.Tensor]) -> None:
        """Bring all into blocks, one behind the other.

        Huge pages would cost more than they give: of an adapter, short pieces are read.
        """
        sizes = [_num_bytes(each) for each in matrices]
        total = sum(sizes)
        memory = torch.empty(total + _LINE, dtype=torch.uint8, device="cpu")
        self._kept.append(memory)
        self.num_bytes += total
        first = memory.data_ptr() + -memory.data_ptr() % _LINE
        packings = (structs.Packing * len(matrices))()
        for number, (each, offset) in enumerate(
            zip(matrices, accumulate(sizes, initial=0), strict=False)
        ):
            self._addresses[id(each)] = address = first + offset
            out_features, in_features = each.shape
            packings[number] = structs.Packing(
                each.data_ptr(), address, in_features, out_features, dtype_of(each)
            )
        library.quire_pack_copies(packings, len(matrices))

    def _matrix(self, source: torch.Tensor) -> structs.Matrix:
        address, (_, in_features) = self._addresses[id(source)], padded_shape(source)
        out_features = source.shape[0]
        whole = out_features // structs.BLOCK * structs.BLOCK
        tail = address + whole * in_features * source.dtype.itemsize
        return structs.Matrix(address, tail, None, in_features, out_features, dtype_of(source))

    def _delta(self, part: _Part) -> structs.Delta:
        slices = (structs.DeltaSlice * len(part.slices))()
        self._kept.append(slices)
        for number, (first_output, first_rank, b) in enumerate(part.slices):
            slices[number] = structs.DeltaSlice(
                self._matrix(b), first_output, first_rank, b.shape[1]
            )
        return structs.Delta(
            structs.Matrix() if part.a is None else self._matrix(part.a),
            None if part.scales is None else self._addresses[id(part.scales)],
            ctypes.addressof(slices) if part.slices else None,
            len(part.slices),
            None if part.bias is None else self._addresses[id(part.bias)],
            None if part.factor is None else self._addresses[id(part.factor)],
        )

    def _plain(self, table: torch.Tensor) -> structs.Matrix:
        table = _native(table)
        self._kept.append(table)
        self.num_bytes += table.nbytes
        out_features, in_features = table.shape
        return structs.Matrix(
            table.data_ptr(), None, None, in_features, out_features, dtype_of(table)
        )


class _Part:
    """A placed delta, its tensors as they are going to be packed."""

    def __init__(self, placed: PlacedDelta) -> None:
        delta = placed.delta
        first, num_rows = placed.first_row, placed.num_rows
        self.number = placed.number
        self.a = self.scales = None
        if placed.shrinks and delta.a.shape[0] > 0:
            self.a, self.scales = _factor(delta.a), _column(delta.scales)
        self.bias = None if delta.bias is None else _column(delta.bias[first : first + num_rows])
        self.factor = None
        if delta.factor is not None:
            self.factor = _column(delta.factor[first : first + num_rows])
        self.slices = list(_rows_of(delta.slices, first, num_rows))
        if any(first_output % structs.BLOCK for first_output, _, _ in self.slices):
            self.slices = [(0, 0, self._dense(num_rows, delta.a.shape[0]))]

    def _dense(self, num_rows: int, num_ranks: int) -> torch.Tensor:
        """All slices as one: each output belongs to at most one block of it."""
        dtype = self.slices[0][2].dtype
        dense = torch.zeros(num_rows, num_ranks, dtype=dtype, device="cpu")
        for first_output, first_rank, b in self.slices:
            size, rank = b.shape
            dense[first_output : first_output + size, first_rank : first_rank + rank] = b
        return dense

    def matrices(self) -> Iterator[torch.Tensor]:
        """All that is to be packed."""
        for each in (self.a, self.scales, self.bias, self.factor):
            if each is not None:
                yield each
        for _, _, b in self.slices:
            yield b


def _rows_of(
    slices: Sequence[Slice], first: int, num_rows: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield ``(first_output, first_rank, b)`` of the rows from `first` on, counted from there."""
    for each in slices:
        start = max(each.first_row, first)
        end = min(each.first_row + each.b.shape[0], first + num_rows)
        if start < end and each.b.shape[1] > 0:
            b = each.b[start - each.first_row : end - each.first_row]
            yield start - first, each.first_rank, _native(b)


def _native(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the library can read it; itself, if it can."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as the library can multiply rows of a model with it.

    Of bfloat16 it takes inputs in pairs, and the last of an odd number with what lies behind the
    row.
    """
    matrix = _native(matrix)
    return matrix.float() if matrix.shape[1] % 2 else matrix


def _column(numbers: torch.Tensor) -> torch.Tensor:
    """One number for each output: packed, a row that is filled up with zeros."""
    return numbers.float().contiguous().view(-1, 1)


def _num_bytes(matrix: torch.Tensor) -> int:
    out_features, in_features = padded_shape(matrix)
    size = out_features * in_features * matrix.dtype.itemsize
    return size + -size % _LINE
