"""SharedMemory: what ranks on one machine exchange tensors by."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import torch

from quire.errors import OutOfMemoryError, RankError
from quire.kernels.cpu import structs
from quire.kernels.cpu.library import load_library
from quire.parallel.group import Exchanged
from quire.parallel.place import Place

PATIENCE = 300.0
"""Seconds that a rank waits for another that lives: the longest that a part of a step may take."""

CAPACITY = 1 << 20
"""Floats of a rank's slot: what is larger goes piece by piece."""

_LINK_CAPACITY = 1 << 20  # bytes of a piece
_LINK_PIECES = 16
_REASON = 256


class SharedMemory:
    """Memory that all ranks of a model on one machine have mapped.

    One process makes it and starts the others with its file descriptor, which these give to
    `attach`; then each takes its seat, with `join`. It has no name: nothing of it is left when the
    processes are gone, however they end.

    A rank that ends is found missing by those that wait for it, within a fraction of a second. They
    fail with `RankError`, and so does, from then on, all that anybody waits for.

    Attributes
    ----------
    fd : int
        To be passed on: ``subprocess.Popen(..., pass_fds=[memory.fd])``.
    tensor_size, num_stages : int
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.fd = fd
        self._library = load_library()
        self._map = mmap.mmap(fd, num_bytes)
        self._num_bytes = num_bytes
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._place: Place | None = None
        self._seat: list[int] = []  # the address of its quire_comm, while it has one
        self._release = weakref.finalize(
            self, _release, self._library, self._map, fd, self._seat, os.getpid()
        )
        self._release.atexit = False  # a thread may be in a step until the process ends
        self.tensor_size = self.num_stages = 1

    @classmethod
    def create(
        cls,
        tensor_size: int,
        num_stages: int = 1,
        *,
        capacity: int = CAPACITY,
        link_capacity: int = _LINK_CAPACITY,
        link_pieces: int = _LINK_PIECES,
    ) -> SharedMemory:
        """Make memory for a model's ranks.

        Parameters
        ----------
        tensor_size, num_stages
            Ranks of a stage, and stages.
        capacity
            Floats that each rank has room for to offer its stage at once. More than that takes
            several exchanges; best is room for all of a step, the number of tokens times the hidden
            size. Memory is taken from the system as it is used.
        link_capacity, link_pieces
            Bytes of a piece of what goes from stage to stage, and how many may be on their way.
        """
        sizes = structs.SharedSizes(tensor_size, num_stages, capacity, link_capacity, link_pieces)
        if min(tensor_size, num_stages, capacity, link_capacity, link_pieces) < 1:
            raise ValueError("the sizes of shared memory are at least 1")
        num_bytes = load_library().quire_shared_size(sizes)
        fd = _make_file(num_bytes)
        try:
            memory = cls(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        memory._library.quire_shared_init(memory.base, sizes)
        memory.tensor_size, memory.num_stages = tensor_size, num_stages
        return memory

    @classmethod
    def attach(cls, fd: int) -> SharedMemory:
        """Map what another process made.

        Parameters
        ----------
        fd
            The descriptor that it has in this process, which is this object's from now on.
        """
        num_bytes = os.fstat(fd).st_size
        memory = cls(fd, num_bytes)
        sizes = structs.SharedSizes()
        if memory._library.quire_shared_sizes(memory.base, num_bytes, sizes) != 0:
            memory.close()
            raise ValueError(f"file descriptor {fd} is no memory that ranks of a model share")
        memory.tensor_size, memory.num_stages = sizes.tensor_size, sizes.num_stages
        return memory

    def join(self, rank: int, *, patience: float = PATIENCE) -> None:
        """Take the seat of a rank, from which groups and links are had; once in a process.

        Parameters
        ----------
        rank
            Among all of the model.
        patience
            Seconds that it waits for another rank that lives, also for one that has not joined yet.
        """
        if self._seat:
            raise RuntimeError(f"this process has joined, as rank {self.place.rank}")
        num_ranks = self.tensor_size * self.num_stages
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank is {rank}; there are {num_ranks}")
        comm = self._library.quire_comm_new(self.base, rank, self.fd, patience)
        if not comm:
            raise OutOfMemoryError("no memory for a rank's seat")
        self._place = Place.of_rank(rank, self.tensor_size, self.num_stages)
        self._seat.append(comm)

    @property
    def comm(self) -> int:
        """The address of this rank's ``quire_comm``, once it has joined."""
        if not self._seat:
            raise RuntimeError("a rank must join before it takes part, and cannot once it has left")
        return self._seat[0]

    def group(self) -> SharedMemoryGroup:
        """Return this rank's group: those of its stage."""
        return SharedMemoryGroup(self)

    def link(self) -> SharedMemoryLink:
        """Return this rank's link: it sends to the next stage and receives from the one before.

        From rank to rank of the same number in its stage; the last stage's next is the first.
        """
        return SharedMemoryLink(self)

    @property
    def place(self) -> Place:
        """Where this rank stands, once it has joined."""
        if self._place is None:
            raise RuntimeError("a rank must join before it has a place")
        return self._place

    def exchanged(self) -> Exchanged:
        """Return what this rank's exchanges took since it joined."""
        counters = structs.CommCounters()
        self._library.quire_comm_counters(self.comm, counters)
        return Exchanged(
            counters.operations, counters.bytes, counters.took * 1e-9, counters.waited * 1e-9
        )

    def abort(self, rank: int, why: str) -> None:
        """Say that a rank is lost, so that nobody waits any longer; from any thread.

        Parameters
        ----------
        rank
            Which one; the first that is said to be lost counts.
        why
            How its sentence goes on, as in ``ended with signal 9``.
        """
        self._library.quire_shared_fail(self.base, rank, why.encode()[: _REASON - 1])

    def failure(self) -> RankError | None:
        """Return what went wrong, if anything did."""
        return _read_failure(self._library, self.base)

    def close(self) -> None:
        """Leave; others that wait for this rank fail. Not during a step."""
        self._release()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, status: int) -> None:
        if status != 0:
            raise _read_failure(self._library, self.base) or RankError(-1, "left")


class SharedMemoryGroup:
    """The ranks of one stage; see `quire.parallel.group.Group`."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.rank, self.size = memory.place.tensor_rank, memory.tensor_size

    @property
    def native(self) -> int | None:
        """Address of the native library's ``quire_comm``."""
        return self.memory.comm

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' tensors, which every rank gets to the same bits."""
        total = x.to(torch.float32).contiguous()
        memory = self.memory
        memory._check(
            memory._library.quire_comm_reduce(memory.comm, total.data_ptr(), total.numel())
        )
        return total.to(x.dtype)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return all ranks' tensors, ``[size, *x.shape]``, on rank 0; None on the others."""
        memory, x = self.memory, x.contiguous()
        out = None
        if self.rank == 0:
            out = torch.empty((self.size, *x.shape), dtype=x.dtype, device="cpu")
        memory._check(
            memory._library.quire_comm_gather(
                memory.comm, x.data_ptr(), x.nbytes, None if out is None else out.data_ptr()
            )
        )
        return out


class SharedMemoryLink:
    """From one stage to the next; see `quire.parallel.group.Link`."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def send(self, x: torch.Tensor) -> None:
        """Hand a tensor to the next stage; it may be written to as soon as this returns."""
        memory, x = self.memory, x.contiguous()
        memory._check(memory._library.quire_comm_send(memory.comm, x.data_ptr(), x.nbytes))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Wait for a tensor of this shape and type from the stage before, and return it."""
        out = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        memory = self.memory
        memory._check(memory._library.quire_comm_receive(memory.comm, out.data_ptr(), out.nbytes))
        return out


def _release(
    library: ctypes.CDLL, mapped: mmap.mmap, fd: int, seat: list[int], process: int
) -> None:
    """Leave; with `mapped`, whose memory is needed for it."""
    # What a fork lets go of is still the other's seat.
    while seat and os.getpid() == process:
        library.quire_comm_free(seat.pop())
    os.close(fd)


def failure_of(comm: int) -> RankError:
    """Return why an exchange of a native step failed, by the address of its ``quire_comm``."""
    library = load_library()
    return _read_failure(library, library.quire_comm_base(comm)) or RankError(-1, "left")


def _read_failure(library: ctypes.CDLL, base: int) -> RankError | None:
    rank, why = ctypes.c_int32(-1), ctypes.create_string_buffer(_REASON)
    if library.quire_shared_failure(base, rank, why, _REASON) == 0:
        return None
    return RankError(rank.value, why.value.decode(errors="replace") or "is gone")


def _make_file(num_bytes: int) -> int:
    """Return the descriptor of a file that has no name."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("quire", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, math.ceil(num_bytes / mmap.PAGESIZE) * mmap.PAGESIZE)
    except BaseException:
        os.close(fd)
        raise
    return fd
