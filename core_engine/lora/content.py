"""The two files of an adapter: whether they changed, what they hold, and the digest of that."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quire.errors import AdapterError, ModelLoadError
from quire.models.safetensors_file import Entry, read_header

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_MOST_CONFIG_BYTES = 8 << 20

# What says nothing about the numbers: where and how an adapter was made.
METADATA = frozenset(
    {
        "auto_mapping",
        "base_model_class",
        "base_model_name_or_path",
        "inference_mode",
        "parent_library",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the file system says of a file; it changes when the file does."""

    size: int
    changed_ns: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the file system says of an adapter's two files; equal: the same content.

    A file that is written twice within one tick of the file system's clock, with as many bytes,
    keeps its stamp: a fingerprint is to be trusted once `changed_ns` is some time ago.
    """

    config: Stamp
    tensors: Stamp

    @property
    def changed_ns(self) -> int:
        """When either file changed last, in nanoseconds since 1970."""
        return max(self.config.changed_ns, self.tensors.changed_ns)


def fingerprint(folder: Path) -> Fingerprint:
    """Look at an adapter's files without opening them.

    Raises
    ------
    AdapterError
        One is missing, or cannot be looked at.
    """
    stamps = []
    for name in (CONFIG_FILE, TENSORS_FILE):
        try:
            found = (folder / name).stat()
        except (OSError, ValueError) as error:
            raise _missing(folder, name, error) from error
        # A tool that copies a file may set its mtime back, but not its ctime.
        changed = max(found.st_mtime_ns, found.st_ctime_ns)
        stamps.append(Stamp(found.st_size, changed, found.st_ino, found.st_dev))
    return Fingerprint(*stamps)


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open a file of an adapter for reading; pipes and devices, which may block, are refused.

    Raises
    ------
    AdapterError
        It is missing, cannot be read, or is no file.
    """
    path = folder / name
    # Without O_NONBLOCK, a pipe would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _missing(folder, name, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path} is no regular file")
    return open(descriptor, "rb", buffering=0)


def _missing(folder: Path, name: str, error: Exception) -> AdapterError:
    path = folder / name
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return AdapterError(f"{path} cannot be read: {error}")
    try:
        names = sorted(each.name for each in folder.iterdir())
    except OSError as failure:
        return AdapterError(
            f"{folder} is no folder that can be read ({failure.strerror}); an adapter is a folder "
            f"with {CONFIG_FILE} and {TENSORS_FILE}"
        )
    if name == CONFIG_FILE and "config.json" in names:
        why = "it is a whole model, to be loaded as model=, not as an adapter"
    elif name == TENSORS_FILE and "adapter_model.bin" in names:
        why = (
            "its adapter_model.bin is not read, because unpickling can run code: load it with peft "
            "and save it with save_pretrained(..., safe_serialization=True)"
        )
    else:
        why = f"it has: {', '.join(names[:10]) or 'nothing'}"
    return AdapterError(f"{folder} has no {name}; {why}")


def read_json(folder: Path) -> dict[str, Any]:
    """Read the configuration of an adapter.

    Raises
    ------
    AdapterError
        It is missing, or no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        with open_regular(folder, CONFIG_FILE) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_CONFIG_BYTES:
                raise AdapterError(f"{path} has {size} bytes; that is no configuration")
            content = json.loads(file.read(_MOST_CONFIG_BYTES) or b"")
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: it is no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is damaged: it must be a JSON object")
    return content


class TensorsFile:
    """The tensors of an adapter: first what there is, from the header, and then their bytes.

    All bytes are read once, and tensors and digest both come from them: when somebody writes into
    the file meanwhile, what was read may be damaged, but it is what the digest says.

    Parameters
    ----------
    folder
        The adapter's folder.

    Attributes
    ----------
    path : Path
    entries : mapping of str to Entry

    Raises
    ------
    AdapterError
        The file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TENSORS_FILE
        self._file = open_regular(folder, TENSORS_FILE)
        self._hash = hashlib.sha256()
        self._content = bytearray()
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.entries: Mapping[str, Entry] = read_header(self.path, self._read, self._size)
            self._header_bytes = self._file.tell()
            if sum(each.end - each.begin for each in self.entries.values()) != (
                self._size - self._header_bytes
            ):
                raise AdapterError(
                    f"{self.path} is damaged: it has {self._size} bytes, not as many as its header "
                    "and its tensors take"
                )
        except BaseException as error:
            self._file.close()
            if isinstance(error, ModelLoadError):
                raise AdapterError(str(error)) from error
            if isinstance(error, OSError):
                raise AdapterError(f"{self.path} cannot be read: {error}") from error
            raise

    def __enter__(self) -> TensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, length: int) -> bytes:
        content = self._file.read(length)
        self._hash.update(content)
        return content

    def load(self) -> None:
        """Read all bytes; to be called once what they are said to be has been found to fit.

        Raises
        ------
        AdapterError
            There are fewer than there were, or there is no memory for them.
        """
        length = self._size - self._header_bytes
        try:
            self._content = bytearray(length)
            view, done = memoryview(self._content), 0
            while done < length and (count := self._file.readinto(view[done:])):  # type: ignore[attr-defined]
                done += count
        except OSError as error:
            raise AdapterError(f"{self.path} cannot be read: {error}") from error
        except MemoryError as error:
            raise AdapterError(f"{self.path}: no memory for its {length} bytes") from error
        if done < length:
            raise AdapterError(f"{self.path} is truncated: it lost {length - done} bytes just now")
        self._hash.update(self._content)

    def digest(self, config: bytes) -> str:
        """Sha256 of the canonical configuration and all bytes of the file."""
        whole = self._hash.copy()
        whole.update(hashlib.sha256(config).digest())
        return whole.hexdigest()

    def largest(self) -> float:
        """Return the largest magnitude of all tensors; NaN or infinity where one has that."""
        largest = 0.0
        # Of tensors side by side, one pass; there are no gaps between them.
        for dtype, run in groupby(self.entries.values(), key=lambda entry: entry.dtype):
            each = list(run)
            begin, end = each[0].begin - self._header_bytes, each[-1].end - self._header_bytes
            if begin == end:
                continue
            low, high = self._view(dtype, begin, end).aminmax()
            magnitude = max(-float(low), float(high))
            if not magnitude <= largest:
                largest = magnitude
            if math.isnan(largest):
                break
        return largest

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the bytes that `load` read."""
        dtype, shape, begin, end = self.entries[name]
        begin, end = begin - self._header_bytes, end - self._header_bytes
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return self._view(dtype, begin, end).view(shape)

    def _view(self, dtype: torch.dtype, begin: int, end: int) -> torch.Tensor:
        if begin % dtype.itemsize:
            return torch.frombuffer(self._content[begin:end], dtype=dtype)
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self._content, dtype=dtype, count=count, offset=begin)
