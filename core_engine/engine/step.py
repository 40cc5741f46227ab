"""Step: one step on its way, from its plan to the tokens that it gives."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.sequence import Sequence, SequenceStatus
from quire.utils.transfers import upload

if TYPE_CHECKING:
    from quire.engine.sequence_table import CutBatch
    from quire.engine.step_plan import StepPlan
    from quire.sampling.sampler import PendingTokens
    from quire.structured.masks import Masks

_NO_ROWS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Step:
    """A step that was launched, or could not be.

    Sequences end while it is on its way: by the tokens of the step before, or because somebody
    aborts their request. What it computes of them is in vain, and :meth:`drop_ended` leaves them
    out of everything but the plan.

    Attributes
    ----------
    plan : StepPlan
    error : Exception or None
        Why it could not be launched.
    members : list of Sequence
        The plan's.
    rows : ndarray[num_seqs], int64
        Theirs, ended ones included.
    sequences : list of Sequence
        Those that are given a token.
    chosen_rows : ndarray[len(sequences)], int64
    num_drafts : list of int
        Of those.
    wanted : Tensor[num_logits], int64, or None
        The tokens of the step after which logits are wanted, on the device.
    host_wanted : ndarray[num_logits], int64
        The same.
    adapter_slots : Tensor[num_tokens], int32, on the CPU, or None
    hidden : Tensor[num_tokens, hidden_size] or None
    masks : Future of Masks or None
        Being filled for the sequences that have a grammar.
    pending : PendingTokens or None
        What it gives, while only the device knows.
    """

    plan: StepPlan
    error: Exception | None = None
    members: list[Sequence] = field(default_factory=list)
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    sequences: list[Sequence] = field(default_factory=list)
    chosen_rows: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    num_drafts: list[int] = field(default_factory=list)
    wanted: torch.Tensor | None = None
    host_wanted: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_ROWS)
    adapter_slots: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    masks: Future[Masks] | None = None
    pending: PendingTokens | None = None
    _kept_logits: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        self.members = self.plan.sequences

    def take_batch(self, cut: CutBatch) -> None:
        """Note what is to come of the step's batch."""
        plan, caught_up = self.plan, cut.caught_up.tolist()
        self.rows = cut.rows
        self.sequences = [plan.sequences[i] for i in caught_up]
        self.num_drafts = [plan.num_drafts[i] for i in caught_up]
        self.chosen_rows = cut.rows[cut.caught_up]
        self.wanted, self.host_wanted = cut.batch.logits_indices, cut.logits_indices
        self.adapter_slots = cut.batch.adapter_slots

    def drop_ended(self) -> list[int] | None:
        """Leave out the sequences that have ended.

        Returns
        -------
        list of int or None
            The places of those of ``sequences`` that are left; None: all.
        """
        ended = SequenceStatus.FINISHED
        if not any(sequence.status is ended for sequence in self.members):
            return None
        self.members = [sequence for sequence in self.members if sequence.status is not ended]
        kept = [i for i, sequence in enumerate(self.sequences) if sequence.status is not ended]
        if len(kept) == len(self.sequences):
            return None
        if self.wanted is not None:
            is_kept = np.zeros(len(self.sequences), dtype=np.bool_)
            is_kept[kept] = True
            self._kept_logits = np.flatnonzero(np.repeat(is_kept, np.array(self.num_drafts) + 1))
            self.host_wanted = self.host_wanted[self._kept_logits]
            (self.wanted,) = upload([self.host_wanted], self.wanted.device)
        self.sequences = [self.sequences[i] for i in kept]
        self.num_drafts = [self.num_drafts[i] for i in kept]
        self.chosen_rows = self.chosen_rows[kept]
        return kept

    def wait_for_masks(self) -> Masks | None:
        """Return the masks of the logits that are wanted."""
        if self.masks is None:
            return None
        found = self.masks.result()
        return found if self._kept_logits is None else found.select(self._kept_logits)

    def let_go(self) -> None:
        """Let go of what the model said; until masks are filled, constraints are in use."""
        self.hidden = self.wanted = None
        if self.masks is not None:
            self.masks.exception()
