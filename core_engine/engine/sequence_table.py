"""SequenceTable: the running sequences as arrays, from which each step's batch is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.batch import ForwardBatch
from quire.engine.last_tokens import LastTokens
from quire.engine.sequence import Sequence
from quire.engine.step_plan import StepPlan
from quire.utils.transfers import upload


@dataclass(slots=True)
class CutBatch:
    """A step's batch, and what the host knows of it.

    Attributes
    ----------
    batch : ForwardBatch
    rows : ndarray[num_seqs], int64
        Of the plan's sequences.
    caught_up : ndarray[num_caught_up], int64
        Which of the sequences are given a token.
    logits_indices : ndarray[num_logits], int64
        The batch's.
    """

    batch: ForwardBatch
    rows: npt.NDArray[np.int64]
    caught_up: npt.NDArray[np.int64]
    logits_indices: npt.NDArray[np.int64]


class SequenceTable:
    """One row per running sequence: its tokens, its blocks, how far it is computed.

    The rows are kept up to date as sequences come, grow and go, so that a step's batch is a few
    array operations and no loop over tokens. Memory is touched only as far as sequences reach.

    Parameters
    ----------
    max_num_seqs : int
        Rows.
    max_model_len : int
        Tokens a row can hold.
    block_size : int
        Tokens per KV block.
    device : torch.device
        Where the batch's tensors go.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self._token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        max_blocks = -(-(max_model_len + 1) // block_size)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._adapter_slots = np.full(max_num_seqs, -1, dtype=np.int32)
        self._num_adapted = 0  # rows with an adapter
        self._is_pending = np.zeros(max_num_seqs, dtype=np.bool_)
        self._last_tokens = LastTokens(max_num_seqs, device)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def assign(self, sequence: Sequence) -> None:
        """Give an admitted sequence a row."""
        row = sequence.row = self._free_rows.pop()
        num_tokens = sequence.num_tokens
        self._token_ids[row, :num_tokens] = sequence.tokens(0, num_tokens)
        self._num_tokens[row] = num_tokens
        self._num_computed[row] = sequence.num_computed_tokens
        self._num_blocks[row] = 0
        if sequence.adapter_slot >= 0:
            self._adapter_slots[row] = sequence.adapter_slot
            self._num_adapted += 1

    def release(self, sequence: Sequence) -> None:
        """Take the row of a sequence that no longer runs."""
        row = sequence.row
        if row >= 0:
            self._block_tables[row, : self._num_blocks[row]] = 0
            self._num_blocks[row] = 0
            self._is_pending[row] = False
            self._free_rows.append(row)
            sequence.row = -1
            if self._adapter_slots[row] >= 0:
                self._adapter_slots[row] = -1
                self._num_adapted -= 1

    def append(self, rows: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64]) -> None:
        """Add one token to each of the rows."""
        self._token_ids[rows, self._num_tokens[rows]] = token_ids
        self._num_tokens[rows] += 1

    def take_back(self, sequence: Sequence) -> None:
        """Remove the token that was added last."""
        self._num_tokens[sequence.row] -= 1

    def expect(self, rows: npt.NDArray[np.int64], token_ids: torch.Tensor) -> None:
        """Count one more token for each of the rows, which only the device knows until `settle`.

        Parameters
        ----------
        rows : ndarray[num_rows], int64
        token_ids : Tensor[num_rows], int64
            On the device.
        """
        self._last_tokens.keep(rows, token_ids)
        self._num_tokens[rows] += 1
        self._is_pending[rows] = True

    def settle(self, rows: npt.NDArray[np.int64]) -> None:
        """Forget the tokens that only the device knows: what they are is added now."""
        self._num_tokens[rows] -= 1
        self._is_pending[rows] = False

    def advance(self, rows: npt.NDArray[np.int64], plan: StepPlan) -> None:
        """Record that a step has run: its rows are computed that far, drafts left out."""
        self._num_computed[rows] += plan.num_new_tokens
        if plan.num_draft_tokens:
            self._num_computed[rows] -= plan.num_drafts

    def advance_by_draft(self, rows: npt.NDArray[np.int64]) -> None:
        """Record that the first draft of each of the rows has become its token."""
        self._num_computed[rows] += 1

    def close(self) -> None:
        """Let go of what lies on the device."""
        self._last_tokens.close()

    def build(self, plan: StepPlan) -> CutBatch:
        """Cut a step's batch.

        Logits are wanted after the last token of each sequence that has caught up, and after each
        of its drafts.
        """
        for sequence in plan.grown:
            row, known = sequence.row, self._num_blocks[sequence.row]
            self._block_tables[row, known : len(sequence.block_ids)] = sequence.block_ids[known:]
            self._num_blocks[row] = len(sequence.block_ids)
        num_seqs = len(plan.sequences)
        rows = np.array([sequence.row for sequence in plan.sequences], dtype=np.int64)
        if plan.num_draft_tokens:
            self._write_drafts(plan)
        computed = self._num_computed[rows]
        if plan.num_tokens == num_seqs:
            ends = np.arange(1, num_seqs + 1)
            seq_lens = computed + 1
            token_rows, positions = rows, computed
        else:
            counts = np.array(plan.num_new_tokens, dtype=np.int64)
            ends = np.cumsum(counts)
            seq_lens = computed + counts
            token_rows = np.repeat(rows, counts)
            positions = np.arange(ends[-1]) - np.repeat(ends - seq_lens, counts)
        blocks = self._block_tables[token_rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        num_drafts = np.array(plan.num_drafts, dtype=np.int64) if plan.num_draft_tokens else None
        known = self._num_tokens[rows]
        if num_drafts is not None:
            known = known + num_drafts
        caught_up = np.flatnonzero(seq_lens == known)
        logits_indices = ends[caught_up] - 1
        if num_drafts is not None:
            counts = num_drafts[caught_up] + 1
            logits_indices = np.repeat(logits_indices - np.cumsum(counts) + 1, counts)
            logits_indices += np.arange(len(logits_indices))
        width = -(-int(seq_lens.max()) // self.block_size)
        query_start_loc = np.zeros(num_seqs + 1, dtype=np.int32)
        query_start_loc[1:] = ends
        is_pending = self._is_pending[rows]
        pending_rows = None
        if is_pending.any():  # the last of their tokens, and of no other sequence's
            pending_rows = np.full(len(positions), -1, dtype=np.int64)
            pending_rows[ends[is_pending] - 1] = rows[is_pending]
        uploaded = upload(
            [
                self._token_ids[token_rows, positions].astype(np.int64),
                positions,
                self._block_tables[rows, :width],
                slots,
                logits_indices,
                *([] if pending_rows is None else [pending_rows]),
            ],
            self.device,
        )
        input_ids = uploaded[0]
        if pending_rows is not None:
            input_ids = self._last_tokens.fill(input_ids, uploaded[5])
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=uploaded[1],
            query_start_loc=torch.from_numpy(query_start_loc),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
            block_tables=uploaded[2],
            slot_mapping=uploaded[3],
            logits_indices=uploaded[4],
        )
        if self._num_adapted:
            adapter_slots = self._adapter_slots[token_rows]
            if adapter_slots.max() >= 0:
                batch.adapter_slots = torch.from_numpy(adapter_slots)
        return CutBatch(batch, rows, caught_up, logits_indices)

    def _write_drafts(self, plan: StepPlan) -> None:
        """Put drafts behind their sequences' tokens, where the next token overwrites them."""
        for sequence, count in zip(plan.sequences, plan.num_drafts, strict=True):
            if count:
                end = self._num_tokens[sequence.row]
                drafts = sequence.draft_token_ids[:count]
                self._token_ids[sequence.row, end : end + count] = drafts

    def check_integrity(self, alive: Iterable[Sequence]) -> None:
        """Raise AssertionError unless rows are free or owned by exactly one sequence alive."""
        running = [s for s in alive if s.row >= 0]
        rows = sorted([s.row for s in running] + self._free_rows)
        assert rows == list(range(len(self._num_tokens))), f"rows lost or doubled: {rows}"
        for sequence in running:
            computed = self._num_computed[sequence.row]
            assert computed == sequence.num_computed_tokens, f"{sequence}: {computed} in the table"
            known = self._num_tokens[sequence.row]
            assert known == sequence.num_tokens, f"{sequence}: {known} tokens in the table"
            is_pending = self._is_pending[sequence.row]
            assert is_pending == (sequence.num_pending_tokens > 0), f"{sequence}: who waits?"
            slot = self._adapter_slots[sequence.row]
            assert slot == sequence.adapter_slot, f"{sequence}: slot {slot} in the table"
        num_adapted = np.count_nonzero(self._adapter_slots >= 0)
        assert num_adapted == self._num_adapted, f"{num_adapted} rows with an adapter"
