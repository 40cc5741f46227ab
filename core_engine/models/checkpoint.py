"""The weight files of a model folder: which there are, and how each is opened."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from quire.errors import ModelLoadError
from quire.models.safetensors_file import SafetensorsFile


class WeightFile(Protocol):
    """Tensors by name; a context manager."""

    path: Path

    def __enter__(self) -> WeightFile:
        """Return itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""

    def names(self) -> list[str]:
        """Names of the tensors."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU; it must be gone before the file is closed."""

    def release(self, name: str, first_row: int, end_row: int) -> None:
        """Take note that these rows of a tensor have been copied."""


class TorchFile:
    """The tensors of a file that ``torch.save`` wrote; nothing but tensors is unpickled.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ModelLoadError
        The file is missing, damaged, or holds anything but tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = self._load(mmap=True)
        except pickle.UnpicklingError as error:
            raise ModelLoadError(
                f"{path} holds something other than tensors, or is damaged; it is not unpickled. "
                "A safetensors version of the checkpoint is safe to load"
            ) from error
        except Exception as error:
            raise ModelLoadError(f"{path} is truncated or damaged: {error}") from error
        if isinstance(content, dict):
            content = {name: each for name, each in content.items() if not _is_count(name, each)}
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in content.items()
        ):
            raise ModelLoadError(f"{path} is not a dictionary of tensors by name")
        for name, value in content.items():
            if value.layout != torch.strided or value.is_meta:
                raise ModelLoadError(f"{path}: {name!r} is a sparse tensor, or one without values")
            # Strides of 0 make any number of values of one: a small file could fill the memory.
            if value.nbytes > (stored := value.untyped_storage().nbytes()):
                raise ModelLoadError(
                    f"{path}: {name!r} has the shape {list(value.shape)}, and the file has "
                    f"{stored} bytes for it; {value.nbytes} are needed"
                )
        self._tensors: dict[str, torch.Tensor] = content

    def _load(self, *, mmap: bool) -> object:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            # Files from before torch 1.6 have another container, which cannot be mapped.
            if mmap and "mmap can only be used" in str(error):
                return self._load(mmap=False)
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors = {}

    def names(self) -> list[str]:
        """See `WeightFile.names`."""
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """See `WeightFile.tensor`."""
        return self._tensors[name].detach()

    def release(self, name: str, first_row: int, end_row: int) -> None:
        """See `WeightFile.release`; the mapping goes with the last tensor of the file."""


def _is_count(name: object, value: object) -> bool:
    """Whether an entry is one of SqueezeLLM's, which say of each sparse part how long it is."""
    return isinstance(name, str) and name.startswith("sparse_threshold.") and isinstance(value, int)


def open_file(path: Path) -> WeightFile:
    """Open a weight file by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


_NO_MODEL = frozenset(
    {
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "optimizer.pt",
        "rng_state.pt",
        "scaler.pt",
        "scheduler.pt",
    }
)
"""Files of the same endings that have something else in them, or other names."""

_SHARD = re.compile(r"-\d+-of-\d+$")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that together hold a model's weights.

    Safetensors are preferred to ``.bin`` files, an index to a single file. Where there is none of
    the usual name, a single one of any other is taken, or its shards, of safetensors or, as
    SqueezeLLM writes them, a ``.pt`` file.

    Raises
    ------
    ModelLoadError
        There are none, or several of other names, or a file that an index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _indexed(index, suffix)
        single = folder / f"{stem}.{suffix}"
        if single.is_file():
            return [single]
        # Written as shards whose index was left out: missing weights are found out by name.
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return shards
    for pattern in ("*.safetensors", "*.pt"):
        others = [each for each in sorted(folder.glob(pattern)) if each.name not in _NO_MODEL]
        if len(others) == 1 or (others and all(_SHARD.search(each.stem) for each in others)):
            return others
        if others:
            names = ", ".join(each.name for each in others[:20])
            raise ModelLoadError(
                f"{folder} has several weight files of no usual name: {names}. Leave the one "
                "that is meant"
            )
    found = ", ".join(sorted(each.name for each in folder.iterdir())[:20])
    raise ModelLoadError(
        f"{folder} has no weights: no model.safetensors, pytorch_model.bin, or index of shards, "
        "nor any other .safetensors or .pt file of a model. "
        f"It has: {found or 'nothing'}"
    )


def _indexed(index: Path, suffix: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelLoadError(
            f"{index} is damaged: it must be a JSON object with a 'weight_map'"
        ) from error
    files = [index.parent / str(name) for name in names]
    for name, file in zip(names, files, strict=True):
        # The index is outside data: it may name files beside it and nothing else.
        if file.name != name or file.suffix != f".{suffix}":
            raise ModelLoadError(f"{index} names {name!r}, which is no .{suffix} file beside it")
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing; {index.name} names it")
    return files
