"""Unstacked: a weight file with tensors that hold a matrix for each expert taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from quire.models.checkpoint import WeightFile


def unstacked(file: WeightFile, ends: Sequence[str]) -> WeightFile:
    """Return a file as if ``experts.down_proj`` were ``experts.0.down_proj.weight`` and so on.

    Parameters
    ----------
    file
    ends
        Ends of names of such tensors. Those of other than three axes stay as they are.

    Returns
    -------
    WeightFile
        The file itself, where it has no such tensor.
    """
    whole: dict[str, list[str]] = {}
    for name in file.names():
        if any(name == end or name.endswith(f".{end}") for end in ends):
            shape = file.tensor(name).shape
            if len(shape) == 3:
                stem, _, last = name.rpartition(".")
                whole[name] = [f"{stem}.{number}.{last}.weight" for number in range(shape[0])]
    return Unstacked(file, whole) if whole else file


class Unstacked:
    """See `unstacked`.

    Parameters
    ----------
    file
    stacks
        Names of tensors of three axes, and of the matrices that each holds.
    """

    def __init__(self, file: WeightFile, stacks: dict[str, list[str]]) -> None:
        self.path = file.path
        self._file = file
        self._stacks = stacks
        self._parts = {
            part: (name, number)
            for name, parts in stacks.items()
            for number, part in enumerate(parts)
        }

    def __enter__(self) -> Unstacked:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def names(self) -> list[str]:
        """See `WeightFile.names`."""
        return [part for name in self._file.names() for part in self._stacks.get(name, [name])]

    def tensor(self, name: str) -> torch.Tensor:
        """See `WeightFile.tensor`."""
        if name not in self._parts:
            return self._file.tensor(name)
        stack, number = self._parts[name]
        return self._file.tensor(stack)[number]

    def release(self, name: str, first_row: int, end_row: int) -> None:
        """See `WeightFile.release`; a matrix is released as one, with its last row."""
        if name not in self._parts:
            self._file.release(name, first_row, end_row)
            return
        stack, number = self._parts[name]
        if end_row == self._file.tensor(stack).shape[1]:
            self._file.release(stack, number, number + 1)
