"""MaskFiller: the masks of a step's rows, filled while the model computes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.utils.transfers import upload

if TYPE_CHECKING:
    from quire.structured.constraint import Constraint


@dataclass(slots=True)
class MaskRequest:
    """A row that is to be masked.

    Attributes
    ----------
    place : int
        Of the row, in the logits; those after its drafts follow.
    constraint : Constraint
    drafts : sequence of int
        Tokens that the constraint allows next, one after the other.
    eos_token_ids : collection of int
        Tokens that end a text: allowed where the constraint accepts it, and nowhere else.
    stop_token_ids : collection of int
        Tokens that a request wants to end its text, and that may be a part of others: allowed
        where the constraint accepts the text, and as text wherever it allows them.
    """

    place: int
    constraint: Constraint
    drafts: Sequence[int]
    eos_token_ids: Collection[int]
    stop_token_ids: Collection[int]


@dataclass(slots=True)
class Masks:
    """The masks of a step.

    Attributes
    ----------
    places : ndarray[num_masks], int64
        The rows of the logits, in order.
    bitmask : Tensor[num_masks, num_words], int32
        As :meth:`quire.kernels.interface.Backend.apply_bitmask` takes it.
    failures : dict of int to BaseException
        Why a row has no mask, by its place.
    """

    places: npt.NDArray[np.int64]
    bitmask: torch.Tensor
    failures: dict[int, BaseException] = field(default_factory=dict)

    def select(self, places: npt.NDArray[np.int64]) -> Masks:
        """Return the masks of some rows of the logits, for a batch that has just these."""
        found = np.searchsorted(self.places, places).clip(max=len(self.places) - 1)
        masked = np.flatnonzero(self.places[found] == places)
        (wanted,) = upload([found[masked]], self.bitmask.device)
        bitmask = self.bitmask[wanted]
        failures = {
            new: self.failures[old]
            for new, old in enumerate(places.tolist())
            if old in self.failures
        }
        return Masks(masked, bitmask, failures)


class MaskFiller:
    """Fill masks on a thread, into memory that every step uses again.

    Parameters
    ----------
    vocab_size : int
        Tokens of the model.
    max_num_seqs : int
        Rows at first; drafts may need more.
    device : torch.device
        Where the logits are.
    """

    def __init__(self, *, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._num_words = (vocab_size + 1 + 31) // 32  # with the token that stands for the end
        self._bitmask = np.zeros((max_num_seqs, self._num_words), dtype=np.int32)
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
        counts = [1 + len(request.drafts) for request in requests]
        num_masks = sum(counts)
        if num_masks > len(self._bitmask):
            self._bitmask = np.zeros((num_masks, self._num_words), dtype=np.int32)
        bitmask = self._bitmask[:num_masks]
        places = np.concatenate(
            [
                np.arange(request.place, request.place + count)
                for request, count in zip(requests, counts, strict=True)
            ]
        )
        failures: dict[int, BaseException] = {}
        end = 0
        for request, count in zip(requests, counts, strict=True):
            rows = bitmask[end : end + count]
            end += count
            try:
                self._fill_rows(rows, request)
            except BaseException as error:  # a panic of a library is no Exception
                failures.update(dict.fromkeys(range(request.place, request.place + count), error))
                rows.fill(-1)
        (uploaded,) = upload([bitmask], self._device)
        return Masks(places, uploaded, failures)

    def _fill_rows(self, rows: npt.NDArray[np.int32], request: MaskRequest) -> None:
        self._fill_row(rows[0], request)
        constraint = request.constraint
        num_accepted = 0
        try:
            for row, token_id in zip(rows[1:], request.drafts, strict=True):
                constraint.accept([token_id])
                num_accepted += 1
                if constraint.is_finished():
                    row.fill(-1)  # the sequence ends with this draft, or before
                else:
                    self._fill_row(row, request)
        finally:
            if num_accepted:
                constraint.rollback(num_accepted)

    def _fill_row(self, row: npt.NDArray[np.int32], request: MaskRequest) -> None:
        request.constraint.fill_mask(row)
        words = row.view(np.uint32)
        words[self._end_word] &= ~self._end_bit
        for id_ in request.eos_token_ids:
            words[id_ // 32] &= ~np.uint32(1 << id_ % 32)
        if request.constraint.is_accepting():
            for id_ in (*request.eos_token_ids, *request.stop_token_ids):
                words[id_ // 32] |= np.uint32(1 << id_ % 32)
