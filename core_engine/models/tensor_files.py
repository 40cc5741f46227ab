"""TensorFiles: the tensors of a whole checkpoint by name, whichever file each is in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from quire.errors import ModelLoadError
from quire.models.checkpoint import WeightFile, open_file, weight_files
from quire.models.stacked import unstacked


class TensorFiles:
    """All weight files of a model folder, opened together; a context manager.

    Parameters
    ----------
    folder
        The model's.
    stacked
        Ends of names of tensors that are taken apart, see `quire.models.family.Family`.

    Raises
    ------
    ModelLoadError
        There are none, one is damaged, or two have the same tensor.
    """

    def __init__(self, folder: Path, stacked: Sequence[str] = ()) -> None:
        self.folder = folder
        self._files: dict[str, WeightFile] = {}
        with ExitStack() as stack:
            for path in weight_files(folder):
                file = stack.enter_context(unstacked(open_file(path), stacked))
                for name in file.names():
                    if name in self._files:
                        raise ModelLoadError(
                            f"{name!r} is in {self._files[name].path.name} and in {path.name} of "
                            f"{folder}; it must be in one of them"
                        )
                    self._files[name] = file
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._files = {}

    def names(self) -> list[str]:
        """Names of all tensors, file by file."""
        return list(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU; it must be gone before the files are closed."""
        return self._files[name].tensor(name)

    def release(self, name: str) -> None:
        """Let the memory of a tensor go that has been read; it is read again if it is touched."""
        file = self._files[name]
        tensor = file.tensor(name)
        num_rows = tensor.shape[0] if tensor.dim() else 1
        del tensor
        file.release(name, 0, num_rows)

    def describe(self, name: str) -> str:
        """Say which tensor this is, for a message that goes on."""
        return f"{self._files[name].path.name} in {self.folder}: {name!r}"
