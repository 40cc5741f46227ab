"""Group and Link: how ranks of one model hand each other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Exchanged:
    """What a rank's exchanges took so far.

    Attributes
    ----------
    operations : int
    num_bytes : int
        That this rank handed over.
    seconds, waited : float
        All of the time, and that part of it in which other ranks were waited for.
    """

    operations: int
    num_bytes: int
    seconds: float
    waited: float


class Group(Protocol):
    """The ranks of one stage, which compute each layer together.

    All of them call the same methods in the same order, with tensors of the same shape and type.

    Attributes
    ----------
    rank, size : int
        Which of the stage's ranks this is, and how many there are.
    """

    rank: int
    size: int

    @property
    def native(self) -> int | None:
        """Address of the native library's ``quire_comm``.

        None where there is none, and steps must go operation by operation.
        """

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' tensors, which every rank gets to the same bits.

        Parameters
        ----------
        x : Tensor, of any float type
            Summed in float32, in the order of the ranks. It may be used up, or be the result.
        """

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return all ranks' tensors, ``[size, *x.shape]``, on rank 0; None on the others.

        Parameters
        ----------
        x : Tensor
            Of the same shape and type on all ranks.
        """


class Link(Protocol):
    """From one stage to the next, or from the last to the first."""

    def send(self, x: torch.Tensor) -> None:
        """Hand over a tensor; it may be written to as soon as this returns."""

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Wait for a tensor of this shape and type, and return it."""
