"""ShardWriter: tensors written to safetensors files one by one, none of them kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PER_ENTRY = 160
"""Bytes that a header has for a tensor beside its name; shapes and offsets take fewer."""

_CHUNK_BYTES = 32 << 20


class ShardWriter:
    """The weight files of a model folder, in the making; a context manager.

    A file's header comes first and is known last: room is kept for it, which spaces fill.

    Parameters
    ----------
    folder
        Where the files go; nothing else may be written to their names.
    names
        All that may be written, any number of them: as much room is kept.
    most_bytes
        Of a file; a tensor that is larger has one of its own.
    """

    def __init__(self, folder: Path, names: list[str], most_bytes: int) -> None:
        self._folder = folder
        room = sum(len(json.dumps(name)) + _PER_ENTRY for name in names)
        self._room = (room + 255) // 8 * 8
        self._most_bytes = most_bytes
        self._file: IO[bytes] | None = None
        self._header: dict[str, Any] = {}
        self._written = 0
        self._shards: list[dict[str, Any]] = []
        self.num_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor."""
        if self._file is not None and self._written + tensor.nbytes > self._most_bytes:
            self._end_file()
        if self._file is None:
            self._file = self._path(len(self._shards)).open("wb")
            self._file.seek(8 + self._room)
            self._header, self._written = {"__metadata__": {"format": "pt"}}, 0
        flat = tensor.contiguous().flatten().view(torch.uint8)
        for first in range(0, len(flat), _CHUNK_BYTES):
            self._file.write(flat[first : first + _CHUNK_BYTES].numpy().data)
        end = self._written + tensor.nbytes
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._written, end],
        }
        self._written = end
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """End the last file and give all of them their names, with an index if there are more."""
        self._end_file()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _end_file(self) -> None:
        assert self._file is not None
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        self._file = None
        self._shards.append({name: None for name in self._header if name != "__metadata__"})

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}.part"
