"""Weights: a model's parameters, allocated once, and the tensors of a checkpoint put into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from quire.errors import ModelLoadError, OutOfMemoryError
from quire.utils import huge_pages

Layout = Literal["plain", "transposed", "grouped"]

_CHUNK_BYTES = 32 << 20


@dataclass(slots=True)
class Parameter:
    """One tensor of the model, possibly a fusion of several of a checkpoint.

    Attributes
    ----------
    tensor : Tensor[rows, ...]
        Unwritten until loaded.
    parts : dict
        Name -> number of rows of each part, in order; empty: a single whole.
    groups : int
        How many groups of heads a fused ``query, key, value`` has (the key/value heads).
    loaded : set of str
        The parts that have their values; ``""`` is the whole.
    """

    tensor: torch.Tensor
    parts: Mapping[str, int] = field(default_factory=dict)
    groups: int = 1
    loaded: set[str] = field(default_factory=set)

    def missing(self) -> list[str]:
        """Parts without values (``[""]`` for the whole)."""
        if "" in self.loaded:
            return []
        return [part for part in self.parts or {"": 0} if part not in self.loaded]


class Weights:
    """Every parameter of a model by its name, e.g. ``layers.3.attention.qkv.weight``.

    Parameters
    ----------
    device, dtype
        Of every parameter that is created.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._parameters: dict[str, Parameter] = {}

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        parts: Mapping[str, int] | None = None,
        groups: int = 1,
    ) -> None:
        """Allocate a parameter; its values come by `fill`.

        Raises
        ------
        OutOfMemoryError
            The device has no room for it.
        """
        try:
            if self.device.type == "cpu":
                tensor = huge_pages.allocate(shape, self.dtype)
            else:
                tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:
            needed = math.prod(shape) * self.dtype.itemsize
            raise OutOfMemoryError(
                f"no memory on {self.device} for {name} ({needed / 2**20:.0f} MiB) after "
                f"{self.num_bytes() / 2**20:.0f} MiB of weights; a smaller model or a dtype of "
                "fewer bytes is needed"
            ) from error
        self._parameters[name] = Parameter(tensor, parts or {}, groups)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parameters[name].tensor

    def get(self, name: str) -> torch.Tensor | None:
        """Return a parameter that a spec may lack, such as a bias."""
        parameter = self._parameters.get(name)
        return None if parameter is None else parameter.tensor

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self._parameters)

    def num_bytes(self) -> int:
        """Bytes of all parameters together."""
        return sum(each.tensor.nbytes for each in self._parameters.values())

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
        """Copy a checkpoint's tensor into its place, converting the dtype on the way.

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
        target = _rows_of(parameter, part)
        expected = tuple(target.shape)
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
        if part in parameter.loaded or "" in parameter.loaded:
            raise ModelLoadError("comes twice")
        if layout == "grouped":
            _copy_grouped(target, source, parameter)
        elif layout == "transposed":
            target.copy_(source.t() if source.dim() == 2 else source)
        else:
            _copy_rows(target, source, done)
        parameter.loaded.add(part)


def _rows_of(parameter: Parameter, part: str) -> torch.Tensor:
    if not part:
        return parameter.tensor
    first = 0
    for name, num_rows in parameter.parts.items():
        if name == part:
            return parameter.tensor[first : first + num_rows]
        first += num_rows
    raise KeyError(part)


def _copy_rows(
    target: torch.Tensor, source: torch.Tensor, done: Callable[[int, int], None] | None
) -> None:
    num_rows = source.shape[0]
    step = max(1, num_rows * _CHUNK_BYTES // max(source.nbytes, 1))
    for first in range(0, num_rows, step):
        end = min(first + step, num_rows)
        target[first:end].copy_(source[first:end])
        if done is not None:
            done(first, end)


def _copy_grouped(target: torch.Tensor, source: torch.Tensor, parameter: Parameter) -> None:
    groups = parameter.groups
    rest = source.shape[1:]
    grouped = source.view(groups, -1, *rest)
    first, in_group = 0, 0
    for num_rows in parameter.parts.values():
        per_group = num_rows // groups
        rows = target[first : first + num_rows].view(groups, per_group, *rest)
        rows.copy_(grouped[:, in_group : in_group + per_group])
        first += num_rows
        in_group += per_group
