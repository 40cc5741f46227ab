"""MaskFiller: the masks of a step's rows, filled while the model computes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from quire.structured.constraint import Constraint


@dataclass(slots=True)
class MaskRequest:
    """A row that is to be masked.

    Attributes
    ----------
    place : int
        Of the row, in the logits.
    constraint : Constraint
    eos_token_ids : collection of int
        Tokens that end a text: allowed where the constraint accepts it, and nowhere else.
    stop_token_ids : collection of int
        Tokens that a request wants to end its text, and that may be a part of others: allowed
        where the constraint accepts the text, and as text wherever it allows them.
    """

    place: int
    constraint: Constraint
    eos_token_ids: Collection[int]
    stop_token_ids: Collection[int]


@dataclass(slots=True)
class Masks:
    """The masks of a step.

    Attributes
    ----------
    places : Tensor[num_masks], int64
        The rows of the logits.
    bitmask : Tensor[num_masks, num_words], int32
        As :meth:`quire.kernels.interface.Backend.apply_bitmask` takes it.
    failures : dict of int to BaseException
        Why a row has no mask, by its place.
    """

    places: torch.Tensor
    bitmask: torch.Tensor
    failures: dict[int, BaseException] = field(default_factory=dict)


class MaskFiller:
    """Fill masks on a thread, into memory that every step uses again.

    Parameters
    ----------
    vocab_size : int
        Tokens of the model.
    max_num_seqs : int
        Rows at most.
    device : torch.device
        Where the logits are.
    """

    def __init__(self, *, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        num_words = (vocab_size + 1 + 31) // 32  # with the token that stands for the end
        self._bitmask = np.zeros((max_num_seqs, num_words), dtype=np.int32)
        self._end_word, self._end_bit = vocab_size // 32, np.uint32(1 << vocab_size % 32)
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-masks")

    def start(self, requests: Iterable[MaskRequest]) -> Future[Masks]:
        """Begin to fill; at most one step's masks at a time."""
        return self._thread.submit(self._fill, list(requests))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _fill(self, requests: list[MaskRequest]) -> Masks:
        bitmask = self._bitmask[: len(requests)]
        failures: dict[int, BaseException] = {}
        for row, request in zip(bitmask, requests, strict=True):
            try:
                self._fill_row(row, request)
            except BaseException as error:  # a panic of a library is no Exception
                failures[request.place] = error
                row.fill(-1)
        places = torch.tensor([request.place for request in requests], dtype=torch.int64)
        return Masks(places.to(self._device), torch.from_numpy(bitmask).to(self._device), failures)

    def _fill_row(self, row: npt.NDArray[np.int32], request: MaskRequest) -> None:
        request.constraint.fill_mask(row)
        words = row.view(np.uint32)
        words[self._end_word] &= ~self._end_bit
        for id_ in request.eos_token_ids:
            words[id_ // 32] &= ~np.uint32(1 << id_ % 32)
        if request.constraint.is_accepting():
            for id_ in (*request.eos_token_ids, *request.stop_token_ids):
                words[id_ // 32] |= np.uint32(1 << id_ % 32)
