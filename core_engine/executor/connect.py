"""Connections among the ranks of one machine: made by the engine's process, taken up by all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quire.kernels.cpu.backend import why_missing
from quire.parallel.fabric import Ends, connect_by_torch
from quire.parallel.place import Place
from quire.parallel.shared_memory import SharedMemory

_PATIENCE = 9.0
"""Seconds by which a rank may be later than the engine's own where they do the same at once."""

_STAGES_PATIENCE = 60.0
"""The same where the others have layers of their own to compute first."""

_STORE_PATIENCE = 600.0
"""The same for what torch.distributed does, where the time to begin counts as well."""

_NO_END = 1e9
"""Who ends a worker is the engine's process, and that one may take its time."""


class Connections:
    """All connections of a model whose ranks are processes of one machine.

    By memory that the ranks share, where they compute on the CPU and the native library is there;
    otherwise by torch.distributed, whose ranks find each other by a file.

    Parameters
    ----------
    tensor_size, num_stages
        How many ranks there are.
    device
        Of the engine's own.
    """

    def __init__(self, tensor_size: int, num_stages: int, device: torch.device) -> None:
        self._memory: SharedMemory | None = None
        self._folder: Path | None = None
        if device.type == "cpu" and why_missing() is None:
            self._memory = SharedMemory.create(tensor_size, num_stages)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="quire-"))

    @property
    def fds(self) -> tuple[int, ...]:
        """What the other processes inherit."""
        return () if self._memory is None else (self._memory.fd,)

    def to_message(self) -> dict[str, Any]:
        """Return what another process takes them up by; see `connect`."""
        return {
            "memory": None if self._memory is None else self._memory.fd,
            "store": None if self._folder is None else str(self._folder / "store"),
        }

    def connect(self, place: Place, device: torch.device) -> Ends:
        """Take up the ends of a rank of this process."""
        if self._memory is None:
            return connect(self.to_message(), place, device)
        patience = _PATIENCE if place.num_stages == 1 else _STAGES_PATIENCE
        self._memory.join(place.rank, patience=patience)
        return ends_by_memory(self._memory, place)

    def abort(self, rank: int, why: str) -> None:
        """End all waiting, everywhere; what torch.distributed waits for ends with its processes."""
        if self._memory is not None:
            self._memory.abort(rank, why)

    def close(self) -> None:
        """Give everything back; not during a step."""
        if self._memory is not None:
            self._memory.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def connect(message: Mapping[str, Any], place: Place, device: torch.device) -> Ends:
    """Take up the ends of a rank in a process that was told of them.

    Parameters
    ----------
    message
        From `Connections.to_message`.
    place
    device
        Of the rank.
    """
    if message["store"] is not None:
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        store = FileStore(message["store"], place.size)
        return connect_by_torch(store, place, device, _STORE_PATIENCE)
    memory = SharedMemory.attach(message["memory"])
    memory.join(place.rank, patience=_NO_END)
    return ends_by_memory(memory, place)


def ends_by_memory(memory: SharedMemory, place: Place) -> Ends:
    """Return the ends of a rank that has joined."""
    link = memory.link()  # to the next stage, and from the one before; they are a ring
    is_alone = place.num_stages == 1
    at_ends = place.is_first_stage or place.is_last_stage
    return Ends(
        group=memory.group() if place.tensor_size > 1 else None,
        before=None if place.is_first_stage else link,
        after=None if place.is_last_stage else link,
        home=link if at_ends and not is_alone else None,
        exchanged=memory.exchanged,
    )
