"""RandomSources: a checkpoint that is nowhere, of random numbers as they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from quire.errors import ModelLoadError
from quire.models.family import Family, To
from quire.models.sources import Source
from quire.models.weights import Weights

_SPREAD = 0.02  # what models begin their training with


class RandomSources:
    """In place of `quire.models.sources.Sources`: each tensor that a decoder lacks, drawn.

    A tensor is drawn on the device that it is for, whole and by its name, so that ranks that have
    shares of it have shares of the same. Weights of norms are 1.

    Parameters
    ----------
    weights
        Of the decoder, nothing of it loaded yet.
    family
        What a checkpoint would call its tensors.
    folder
        Where that checkpoint would be.

    Attributes
    ----------
    all : list of Source

    Raises
    ------
    ModelLoadError
        The family has no name for a parameter.
    """

    def __init__(self, weights: Weights, family: Family, folder: Path) -> None:
        self._device, self._dtype = weights.device, weights.dtype
        self._shapes: dict[str, tuple[int, ...]] = {}
        for parameter, part in weights.missing():
            module, _, kind = parameter.rpartition(".")
            name = family.name_of(module, part)
            found = None if name is None else family.find(f"{name}.{kind}")
            if found is None:
                raise ModelLoadError(f"load_format='dummy': no checkpoint has {parameter!r}")
            shape = weights.part_shape(parameter, found.to.part)
            self._shapes[f"{name}.{kind}"] = _as_stored(shape, found.to)
        self.all = [Source(folder, name) for name in self._shapes]
        self._last: tuple[str, torch.Tensor] | None = None

    def __enter__(self) -> RandomSources:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._last = None

    def tensor(self, source: Source) -> torch.Tensor:
        """Draw a tensor; the last one is kept, since loaders ask more than once."""
        if self._last is None or self._last[0] != source.name:
            self._last = None  # its memory serves the next
            self._last = source.name, self._draw(source.name)
        return self._last[1]

    def _draw(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith(".weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device)
        return drawn.mul_(_SPREAD)

    def release(self, source: Source, first_row: int, end_row: int) -> None:
        """See `quire.models.sources.Sources.release`; there is nothing to let go."""

    def done(self, sources: Sequence[Source]) -> None:
        """Let go of the last tensor."""
        self._last = None


def _as_stored(shape: tuple[int, ...], to: To) -> tuple[int, ...]:
    return shape[::-1] if to.layout == "transposed" else shape
