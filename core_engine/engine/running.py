"""RunningSequences: what scheduler, table and sampler know of the sequences that run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quire.engine.sequence import Sequence, SequenceStatus
from quire.sampling.random import derive_seed

if TYPE_CHECKING:
    import torch

    from quire.engine.live_request import LiveRequest
    from quire.engine.scheduler import Scheduler
    from quire.engine.sequence_table import SequenceTable
    from quire.engine.step_plan import StepPlan
    from quire.sampling.sampler import Sampler


class RunningSequences:
    """Lets sequences in, on and out, in the scheduler, the table and the sampler alike.

    Parameters
    ----------
    scheduler : Scheduler
    table : SequenceTable
    sampler : Sampler
    shares_prefixes : bool
        Whether what a request computed can be found by others after its end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        table: SequenceTable,
        sampler: Sampler,
        *,
        shares_prefixes: bool,
    ) -> None:
        self.scheduler = scheduler
        self.table = table
        self.sampler = sampler
        self._shares_prefixes = shares_prefixes

    def admit(self, plan: StepPlan, requests: Mapping[str, LiveRequest]) -> None:
        """Take rows from the sequences that a plan preempts, and give them to those it admits."""
        for sequence in plan.preempted:
            if sequence.row >= 0:
                self.sampler.remove(sequence.row)
                self.table.release(sequence)
        for sequence in plan.admitted:
            self.table.assign(sequence)
            self._add_to_sampler(requests[sequence.request_id], sequence)

    def _add_to_sampler(self, live: LiveRequest, sequence: Sequence) -> None:
        self.sampler.add(
            sequence.row,
            live.request.params,
            seed=derive_seed(live.request.seed, sequence.index),
            prompt_token_ids=sequence.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            eos_token_ids=live.eos_token_ids,
            bad_words_ids=live.request.bad_words_ids,
            masked=sequence.constraint is not None,
        )

    def update(self, plan: StepPlan, rows: npt.NDArray[np.int64]) -> None:
        """Record that a step has run; of sequences that have ended meanwhile, nothing is."""
        self.scheduler.update(plan)
        self.table.advance(rows, plan)  # nobody has the rows of those

    def expect(
        self, sequences: list[Sequence], rows: npt.NDArray[np.int64], token_ids: torch.Tensor
    ) -> None:
        """Record that sequences are given tokens that only the device knows until `settle`."""
        self.table.expect(rows, token_ids)
        for sequence in sequences:
            sequence.num_pending_tokens = 1

    def settle(self, sequences: list[Sequence], rows: npt.NDArray[np.int64]) -> None:
        """Forget the tokens that only the device knows: what they are is put down now."""
        self.table.settle(rows)
        for sequence in sequences:
            sequence.num_pending_tokens = 0

    def accept_draft(self, sequences: list[Sequence], rows: npt.NDArray[np.int64]) -> None:
        """Record that sequences were given the next of their drafts, which is computed already."""
        self.table.advance_by_draft(rows)
        for sequence in sequences:
            self.scheduler.advance(sequence, 1)

    def extend(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Put down tokens that a sequence has been given without a step."""
        if sequence.row >= 0:
            for token_id in token_ids:
                self.table.append(np.array([sequence.row]), np.array([token_id]))

    def continue_beam(self, sequence: Sequence, token_id: int) -> None:
        """Give a parked sequence its token and let it go on."""
        sequence.output_token_ids.append(token_id)
        if sequence.constraint is not None:
            sequence.constraint.accept([token_id])
        self.extend(sequence, [token_id])
        self.scheduler.unpark(sequence)

    def finish(self, live: LiveRequest, sequence: Sequence) -> None:
        """Take a sequence out of everything."""
        if sequence.row >= 0:
            self.sampler.remove(sequence.row)
            self.table.release(sequence)
        if sequence.status is not SequenceStatus.FINISHED:
            self.scheduler.finish(sequence)
        live.sequences.pop(sequence.index, None)
        if not self._shares_prefixes and sequence.publish:
            # Shared within the request only, and nobody is left to find it once that ends.
            live.private_keys.update(sequence.block_keys)
