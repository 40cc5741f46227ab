"""Sources: which file of a checkpoint has which tensor; each file is open while it is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from quire.models.checkpoint import WeightFile, open_file
from quire.models.stacked import unstacked


class Source(NamedTuple):
    """A tensor of a checkpoint."""

    path: Path
    name: str


class Sources:
    """The tensors of some files; a context manager.

    Parameters
    ----------
    paths
        The weight files.
    stacked
        Ends of names of tensors that are taken apart, see `quire.models.family.Family`.

    Attributes
    ----------
    all : list of Source
        In the order of the files, and of the tensors in them.

    Raises
    ------
    ModelLoadError
        A file is missing or damaged.
    """

    def __init__(self, paths: Iterable[Path], stacked: Sequence[str] = ()) -> None:
        self._stacked = stacked
        self.all: list[Source] = []
        for path in paths:
            with self._opened(path) as file:
                self.all += [Source(path, name) for name in file.names()]
        self._left = Counter(source.path for source in self.all)
        self._open: dict[Path, WeightFile] = {}

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.__exit__(kind, error, trace)
        self._open.clear()

    def _opened(self, path: Path) -> WeightFile:
        return unstacked(open_file(path), self._stacked)

    def tensor(self, source: Source) -> torch.Tensor:
        """Return a tensor; it must be gone before `done` says that nobody needs it."""
        if source.path not in self._open:
            self._open[source.path] = self._opened(source.path)
        return self._open[source.path].tensor(source.name)

    def release(self, source: Source, first_row: int, end_row: int) -> None:
        """Take note that these rows of a tensor have been copied."""
        self._open[source.path].release(source.name, first_row, end_row)

    def done(self, sources: Sequence[Source]) -> None:
        """Let go of tensors that nobody needs any more, and of files that have no others."""
        for source in sources:
            path = source.path
            self._left[path] -= 1
            if not self._left[path] and path in self._open:
                self._open.pop(path).__exit__(None, None, None)
