"""SafetensorsFile: tensors of a safetensors file, mapped into memory and let go again.

The format: eight bytes with the header's length, a JSON header with dtype, shape and byte offsets
of each tensor, then the bytes (https://huggingface.co/docs/safetensors). It is read here, and not
through the safetensors package, because the package keeps a file's pages mapped until the whole
file is closed, and so shows a model twice in the process's memory while it loads.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from quire.errors import ModelLoadError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000
_MOST_AXES = 16


class Entry(NamedTuple):
    """A tensor of a file: what it is, and the offsets of its bytes from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, read: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    """Read what tensors a file has, by their names and in the order of their bytes.

    Parameters
    ----------
    path
        For messages.
    read
        Returns the file's next bytes; it stands at the file's beginning.
    size
        Bytes of the file.

    Raises
    ------
    ModelLoadError
        The file is truncated or damaged.
    """
    prefix = read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise ModelLoadError(
            f"{path} is truncated, or no safetensors file: it has {size} bytes, fewer "
            f"than the {8 + length if len(prefix) == 8 else 8} that its header takes"
        )
    if length > _MAX_HEADER:
        raise ModelLoadError(f"{path} is damaged: its header would take {length} bytes")
    try:
        header = json.loads(read(length))
        entries = {
            name: _entry(path, name, value, 8 + length)
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is damaged: its header is no valid JSON") from error
    end = max((each.end for each in entries.values()), default=8 + length)
    if end > size:
        raise ModelLoadError(
            f"{path} is truncated: it has {size} bytes, its header promises {end}; "
            "download it again"
        )
    ordered = sorted(entries.items(), key=lambda item: item[1][2:])
    for (name, entry), (other, following) in pairwise(ordered):
        if following.begin < entry.end:
            raise ModelLoadError(
                f"{path} is damaged: {name!r:.200} and {other!r:.200} lie on the same bytes"
            )
    return dict(ordered)


def _entry(path: Path, name: str, value: Any, offset: int) -> Entry:
    try:
        dtype, shape = _DTYPES.get(value["dtype"]), tuple(value["shape"])
        begin, end = value["data_offsets"]
        if dtype is None:
            raise ModelLoadError(
                f"{path}: {name!r:.200} has the dtype {value['dtype']!r:.100}, which is unknown"
            )
        if not {*map(type, (begin, end, *shape))} <= {int}:
            raise ValueError("sizes and offsets must be integers")
        if len(shape) > _MOST_AXES:  # the product of very many takes forever
            raise ValueError(f"it has {len(shape)} axes")
        if max((0, *shape)) >= 2**63:
            raise ValueError("it has too many rows")
        if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError("the sizes contradict each other")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{path} is damaged: the entry of {name!r:.200} makes no sense ({error})"
        ) from error
    return Entry(dtype, shape, offset + begin, offset + end)


class SafetensorsFile:
    """The tensors of one file; a context manager.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ModelLoadError
        The file is missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                self._entries = read_header(path, file.read, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be read: {error}") from error

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._map.close()

    def names(self) -> list[str]:
        """Names of the tensors, in the order of their bytes."""
        return list(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the mapped bytes; it must be gone before the file is closed."""
        dtype, shape, begin, end = self._entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize:
            raw = torch.frombuffer(bytearray(self._map[begin:end]), dtype=dtype)
        else:
            raw = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=begin)
        return raw.view(shape)

    def release(self, name: str, first_row: int, end_row: int) -> None:
        """Give the pages of some rows back to the system; they are read again if touched."""
        _, shape, begin, end = self._entries[name]
        row_bytes = (end - begin) // max(shape[0] if shape else 1, 1)
        # The borders may share a page with a neighbour: that is read again, too.
        start = (begin + first_row * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = begin + end_row * row_bytes
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
