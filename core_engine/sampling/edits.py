"""What masks, biases, processors and penalties do to the logits of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import QuireError
from quire.sampling.row import Row
from quire.utils.transfers import upload

if TYPE_CHECKING:
    from quire.kernels import Backend

Places = Sequence[int]
Failures = dict[int, BaseException]


class _Entries:
    """Places in the logits, gathered row by row and then addressed at once."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._token_ids: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def places(self) -> list[int]:
        return self._places

    def add(
        self,
        place: int,
        token_ids: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32] | None = None,
    ) -> None:
        if len(token_ids):
            self._places.append(place)
            self._token_ids.append(token_ids)
            if values is not None:
                self._values.append(values)

    def index(self) -> list[npt.NDArray[np.int64]]:
        """Return rows and columns, `[num_entries]` each."""
        return [self.spread(np.array(self._places)), np.concatenate(self._token_ids)]

    def values(self) -> npt.NDArray[np.float32]:
        """Return the values that were added, `[num_entries]`."""
        return np.concatenate(self._values)

    def spread(self, per_row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return one value per entry from one per row."""
        return np.repeat(per_row, [len(ids) for ids in self._token_ids])


def edit_logits(
    logits: torch.Tensor,
    rows: Sequence[Row],
    places: Places,
    kernels: Backend,
    process: Callable[[Failures], Failures],
) -> Failures:
    """Change the logits as their sequences ask, in the order that `Sampler` documents.

    Parameters
    ----------
    logits : Tensor[num_rows, vocab_size], float32
        Changed in place.
    rows : sequence of Row
        Those to be changed.
    places : sequence of int
        Where in ``logits`` each of them is.
    kernels : Backend
    process : callable
        Calls the engine's own processors when their turn has come, with the rows that have failed
        by then, and returns the others that fail.

    Returns
    -------
    dict of int to BaseException
        By place, the rows whose processors failed; what their logits are is left open.
    """
    device = logits.device
    allowed, forbidden, biases = _Entries(), _Entries(), _Entries()
    processed, penalized = [], []
    for place, row in zip(places, rows, strict=True):
        if row.allowed is not None:
            allowed.add(place, row.allowed)
        forbidden.add(place, row.forbidden())
        biases.add(place, row.bias_ids, row.bias_values)
        if row.processors is not None:
            processed.append((place, row))
        if row.counts is not None:
            penalized.append((place, row))
    if allowed:
        *index, places_ = upload([*allowed.index(), np.array(allowed.places)], device)
        kept = logits[tuple(index)]
        logits[places_] = -torch.inf
        logits[tuple(index)] = kept
    if forbidden:
        logits[tuple(upload(forbidden.index(), device))] = -torch.inf
    if biases:
        *index, values = upload([*biases.index(), biases.values()], device)
        logits[tuple(index)] += values
    failures = _process(logits, processed)
    failures |= process(failures)
    if penalized:
        _penalize(logits, penalized, kernels)
    return failures


def _process(logits: torch.Tensor, processed: Sequence[tuple[int, Row]]) -> Failures:
    failures: Failures = {}
    for place, row in processed:
        assert row.processors is not None
        try:
            if logits[place].amax().isnan():
                raise QuireError("the model produced NaN logits")
            # A copy, so that a processor that keeps its logits does not keep the batch's.
            logits[place] = row.processors(row.output_token_ids, logits[place].clone())
        except Exception as error:  # also of tensors that a processor has bent
            failures[place] = error
    return failures


def _penalize(logits: torch.Tensor, penalized: Sequence[tuple[int, Row]], kernels: Backend) -> None:
    entries = _Entries()
    params = []
    for place, row in penalized:
        counts = row.update_counts()
        if len(counts.token_ids):
            entries.add(place, counts.token_ids, counts.counts)
            params.append(row.params)
    if not entries:
        return
    penalties = np.array(
        [[p.presence_penalty, p.frequency_penalty, p.repetition_penalty] for p in params]
    )
    # What float32 cannot hold would turn a logit of 0 into NaN.
    range_ = np.finfo(np.float32)
    penalties[:, 2] = penalties[:, 2].clip(range_.tiny, range_.max)
    per_row = penalties.astype(np.float32)
    columns: list[npt.NDArray[Any]] = [
        *entries.index(),
        entries.values(),
        *(entries.spread(per_row[:, column]) for column in range(3)),
    ]
    kernels.apply_penalties(logits, *upload(columns, logits.device))
