"""Weights: a model's parameters, each in memory once, and how a checkpoint's tensors get there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from quire.errors import ModelLoadError, OutOfMemoryError
from quire.kernels.quantized import QuantizedWeight
from quire.models.coded import CodedWeight, Piece, on_device, share_of_codes
from quire.models.cut import Cut
from quire.utils import huge_pages

Layout = Literal["plain", "transposed", "grouped"]

_CHUNK_BYTES = 32 << 20


@dataclass(slots=True)
class Parameter:
    """One tensor of the model, possibly a fusion of several of a checkpoint.

    Attributes
    ----------
    cut : Cut
        What it is as a whole, and which of that is here.
    shape : tuple of int
        Of what is here, rows first.
    parts : dict
        Name -> number of rows of each part that are here, in order; empty: a single whole.
    tensor : Tensor[rows, ...] or None
        Unwritten until loaded; None: nothing has asked for it yet, or it is in codes.
    loaded : set of str
        The parts that have their values; ``""`` is the whole.
    codes : dict
        Those of them that came in codes, until all are there.
    coded : CodedWeight or None
        All of them, in stead of `tensor`.
    stack : Stack or None
        Where it lies, if that is beside others of its shape.
    """

    cut: Cut
    shape: tuple[int, ...] = field(init=False)
    parts: Mapping[str, int] = field(init=False)
    tensor: torch.Tensor | None = None
    loaded: set[str] = field(default_factory=set)
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    coded: CodedWeight | None = None
    stack: Stack | None = None

    def __post_init__(self) -> None:
        self.shape, self.parts = self.cut.own_shape, self.cut.own_parts

    def missing(self) -> list[str]:
        """Parts without values (``[""]`` for the whole)."""
        if "" in self.loaded:
            return []
        return [part for part in self.parts or {"": 0} if part not in self.loaded]

    def rows(self, part: str) -> slice:
        """Where a part lies; ``""`` is the whole."""
        first = 0
        for name, num_rows in (self.parts if part else {}).items():
            if name == part:
                return slice(first, first + num_rows)
            first += num_rows
        if part:
            raise KeyError(part)
        return slice(0, self.shape[0])


class Stack:
    """Parameters of one shape that are to lie side by side in one tensor, as far as they are plain.

    Attributes
    ----------
    names : tuple of str
        In the tensor's order.
    tensor : Tensor[len(names), ...] or None
        None: none of them has been asked for, or some are in codes; each is then by itself.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.tensor: torch.Tensor | None = None


class Weights:
    """Every parameter of a model by its name, e.g. ``layers.3.attention.qkv.weight``.

    Parameters
    ----------
    device, dtype
        Of every parameter that is created.

    Attributes
    ----------
    elsewhere : set of str
        Names of the model's other parameters, of which this rank has nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.elsewhere: set[str] = set()
        self._parameters: dict[str, Parameter] = {}

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        parts: Mapping[str, int] | None = None,
        groups: int = 1,
    ) -> None:
        """Enter a parameter; its values come by `fill` or `put_codes`.

        It is allocated when it is first asked for.
        """
        self.enter(name, Cut(shape, parts or {}, groups))

    def enter(self, name: str, cut: Cut) -> None:
        """Enter a parameter of which perhaps not all is here; see `create`."""
        self._parameters[name] = Parameter(cut)
        self.elsewhere.discard(name)

    def leave(self, name: str) -> None:
        """Take note that a parameter is elsewhere, and not here."""
        self._parameters.pop(name, None)
        self.elsewhere.add(name)

    def stack(self, names: Sequence[str]) -> None:
        """Have parameters of one shape lie side by side, unless some come in codes.

        They remain parameters like any other, each a view. To be called before they are filled.

        Parameters
        ----------
        names
            In order.

        Raises
        ------
        ValueError
            They are of different shapes, or have been allocated.
        """
        members = [self._parameters[name] for name in names]
        if len({each.shape for each in members}) > 1:
            raise ValueError(f"{names[0]} and others to be stacked with it differ in shape")
        if any(each.tensor is not None or each.codes for each in members):
            raise ValueError(f"{names[0]} or others to be stacked with it have values")
        stack = Stack(tuple(names))
        for each in members:
            each.stack = stack

    def stacked(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the tensor that has exactly these parameters; None: there is none.

        Parameters
        ----------
        names
            In order.

        Returns
        -------
        Tensor[len(names), ...] or None
        """
        stack = self._parameters[names[0]].stack if names else None
        if stack is None or stack.names != tuple(names):
            return None
        for name in names:
            self._allocated(name)
        return stack.tensor

    def _unstack(self, stack: Stack) -> None:
        """Leave each parameter by itself, those that have values in memory of their own."""
        for name in stack.names:
            parameter = self._parameters[name]
            parameter.stack = None
            if parameter.tensor is not None:
                view, parameter.tensor = parameter.tensor, self._allocate(name, parameter.shape)
                parameter.tensor.copy_(view)
        stack.tensor = None

    def _allocated(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if parameter.coded is not None:
            raise ValueError(f"{name} is in codes; it has no tensor")
        if parameter.tensor is None:
            stack = parameter.stack
            if stack is None:
                parameter.tensor = self._allocate(name, parameter.shape)
            else:
                if stack.tensor is None:
                    stack.tensor = self._allocate(name, (len(stack.names), *parameter.shape))
                parameter.tensor = stack.tensor[stack.names.index(name)]
        return parameter.tensor

    def _allocate(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            if self.device.type == "cpu":
                return huge_pages.allocate(shape, self.dtype)
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:
            needed = math.prod(shape) * self.dtype.itemsize
            raise OutOfMemoryError(
                f"no memory on {self.device} for {name} ({needed / 2**20:.0f} MiB) after "
                f"{self.num_bytes() / 2**20:.0f} MiB of weights; a smaller model, a dtype of "
                "fewer bytes, or quantization= is needed"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._allocated(name)

    def get(self, name: str) -> torch.Tensor | None:
        """Return a parameter that a spec may lack, such as a bias."""
        return self._allocated(name) if name in self._parameters else None

    def coded(self, name: str) -> CodedWeight | None:
        """Return a weight that is in codes, at least in part; None: it is a plain tensor."""
        return self._parameters[name].coded

    def all_coded(self) -> dict[str, CodedWeight]:
        """Return every weight that is in codes, by its name."""
        return {
            name: each.coded for name, each in self._parameters.items() if each.coded is not None
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what is here of a parameter, however it is kept."""
        return self._parameters[name].shape

    def names(self) -> list[str]:
        """Names of all parameters that are here."""
        return list(self._parameters)

    def num_bytes(self) -> int:
        """Bytes of all parameters together."""
        total = 0
        for each in self._parameters.values():
            if each.coded is not None:
                total += each.coded.num_bytes
            elif each.tensor is not None:
                total += each.tensor.nbytes
        return total

    def is_whole(self, name: str) -> bool:
        """Whether all of a parameter is here; also where the model has none of that name."""
        if name in self._parameters:
            return self._parameters[name].cut.is_whole
        return name not in self.elsewhere

    def is_loaded(self, name: str) -> bool:
        """Whether the parameter has all its values."""
        return not self._parameters[name].missing()

    def missing(self) -> list[tuple[str, str]]:
        """``(parameter, part)`` of everything that has no values yet."""
        return [
            (name, part)
            for name, parameter in self._parameters.items()
            for part in parameter.missing()
        ]

    def fill(
        self,
        name: str,
        part: str,
        layout: Layout,
        source: torch.Tensor,
        done: Callable[[int, int], None] | None = None,
    ) -> None:
        """Copy what is here of a checkpoint's tensor, converting the dtype on the way.

        Parameters
        ----------
        name, part
            Where it belongs; ``""`` is the whole parameter.
        layout
            ``"plain"``: as it is. ``"transposed"``: a weight stored ``[in, out]``. ``"grouped"``:
            rows ordered group by group (the queries of a group, its key, its value), to be
            reordered to all queries, all keys, all values.
        source
            The tensor as the checkpoint has it.
        done
            Told ``(first_row, end_row)`` of `source` as rows have been copied, so that a mapped
            file's pages can be let go.

        Raises
        ------
        ModelLoadError
            The shape or the dtype of `source` does not fit, or the place is taken.
        """
        parameter = self._parameters[name]
        self.check(name, part, layout, source)
        target, cut = self._allocated(name)[parameter.rows(part)], parameter.cut
        if layout == "transposed" and source.dim() == 2:
            source = source.t()
        if cut.columns is not None:
            source = source[:, cut.columns.start : cut.columns.stop]
        for run in cut.runs(part, grouped=layout == "grouped"):
            rows = source[run.there : run.there + run.num_rows]
            if layout == "plain":
                _copy_rows(target[run.here :], rows, run.there, done)
            else:
                target[run.here : run.here + run.num_rows].copy_(rows)
        parameter.loaded.add(part)

    def check(self, name: str, part: str, layout: Layout, source: torch.Tensor) -> None:
        """Check that a checkpoint's tensor fits its place, which is still free.

        Raises
        ------
        ModelLoadError
            See `fill`.
        """
        expected = self.part_shape(name, part)
        if layout == "transposed" and len(expected) == 2:
            expected = expected[::-1]
        if tuple(source.shape) != expected:
            raise ModelLoadError(
                f"has the shape {list(source.shape)}, the configuration needs {list(expected)}"
            )
        if not source.dtype.is_floating_point or source.dtype.itemsize < 2:
            raise ModelLoadError(
                f"has the dtype {str(source.dtype).removeprefix('torch.')}; unquantized weights "
                "are float16, bfloat16, float32 or float64"
            )
        self._check_free(name, part)

    def part_shape(self, name: str, part: str) -> tuple[int, ...]:
        """Shape that a part of a parameter has as a whole; ``""`` is all parts."""
        return self._parameters[name].cut.part_shape(part)

    def parts(self, name: str) -> list[str]:
        """Names of a parameter's parts; ``[""]`` where it is of one."""
        return list(self._parameters[name].parts) or [""]

    def _check_free(self, name: str, part: str) -> None:
        loaded = self._parameters[name].loaded
        if part in loaded or "" in loaded or (loaded and not part):
            raise ModelLoadError("comes twice")

    def put_codes(self, name: str, part: str, weight: QuantizedWeight) -> None:
        """Put what is here of a weight in codes, or of a part of one, into its place.

        Raises
        ------
        ModelLoadError
            The shape does not fit, the place is taken, or the weight's groups cannot be cut.
        """
        expected = self.part_shape(name, part)
        if (weight.out_features, weight.in_features) != expected:
            raise ModelLoadError(
                f"stands for a weight of the shape {[weight.out_features, weight.in_features]}, "
                f"the configuration needs {list(expected)}"
            )
        self._check_free(name, part)
        parameter = self._parameters[name]
        if parameter.stack is not None:
            self._unstack(parameter.stack)
        weight = share_of_codes(weight, parameter.cut, part)
        parameter.codes[part] = on_device(weight, self.device)
        parameter.loaded.add(part)

    def settle_codes(self, name: str, cuts: Sequence[int] | None = None) -> CodedWeight | None:
        """Make one weight of the parts that came in codes, and those beside them that did not.

        Parameters
        ----------
        name
        cuts
            See `CodedWeight`; None: the weight is one matrix.

        Returns
        -------
        CodedWeight or None
            None: nothing came in codes, or something is missing.
        """
        parameter = self._parameters[name]
        if not parameter.codes or parameter.missing():
            return None
        pieces: list[Piece] = []
        for part in [""] if "" in parameter.codes else parameter.parts:
            weight = parameter.codes.pop(part, None)
            if weight is not None:
                pieces.append(weight)
            else:
                assert parameter.tensor is not None
                pieces.append(parameter.tensor[parameter.rows(part)].clone())
        parameter.tensor = None
        parameter.coded = CodedWeight(pieces, cuts or (parameter.shape[0],))
        return parameter.coded


def _copy_rows(
    target: torch.Tensor,
    source: torch.Tensor,
    first_row: int,
    done: Callable[[int, int], None] | None,
) -> None:
    """Copy rows, which are from `first_row` on in the checkpoint's tensor."""
    num_rows = source.shape[0]
    step = max(1, num_rows * _CHUNK_BYTES // max(source.nbytes, 1))
    for first in range(0, num_rows, step):
        end = min(first + step, num_rows)
        target[first:end].copy_(source[first:end])
        if done is not None:
            done(first_row + first, first_row + end)
