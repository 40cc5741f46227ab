"""Sampler: one step's logits to one token per row."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.sampling.batch_processors import BatchProcessors
from quire.sampling.edits import edit_logits
from quire.sampling.logprobs import LogprobsTensors
from quire.sampling.pending import (
    PendingTokens,
    SamplerOutput,
    model_error,
    nothing_allowed,
    outcome,
)
from quire.sampling.random import uniforms
from quire.sampling.row import Row, num_beam_candidates
from quire.sampling_params import SamplingParams
from quire.utils.transfers import upload

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.structured.masks import Masks

__all__ = ["LogprobsTensors", "PendingTokens", "Sampler", "SamplerOutput"]


# What a row needs besides the likeliest token of its logits, as bits of one number.
_DRAW = 1
_EDIT = 2
_BEAMS = 4
_LOGPROBS = 8
_MASK = 16
_PROCESSORS = 32

# What has the host look at logits before a token is chosen.
_WAITING = _BEAMS | _MASK | _PROCESSORS

_LEAST_REPETITION = 1e-6
"""A smaller penalty may make logits infinite, which has to be seen to."""


class Sampler:
    """Choose the next token of every row of a batch.

    A row's token depends on its own logits, parameters, seed and tokens, not on its
    neighbours. The order of things, for each row:

    1. log-probabilities, where asked for, from the logits as the model gave them;
    2. the mask of its ``structured_outputs`` forbids tokens, and does so again after step 4,
       should a processor have raised what it forbids;
       ``allowed_token_ids``, ``bad_words`` and ``min_tokens`` forbid tokens;
    3. ``logit_bias`` is added;
    4. ``logits_processors`` are called, in their order, and then the engine's own, which so
       have the last word;
    5. repetition, frequency and presence penalties are applied;
    6. at temperature 0 the likeliest token is taken; else logits are divided by the
       temperature, then ``min_p``, ``top_k`` and ``top_p`` each leave tokens out of what the
       one before left, and one token is drawn from the rest.

    In a beam search, steps 2 to 5 work on log-probabilities and not on logits, as they do in
    transformers, and the best continuations are returned instead of a token.

    Parameters
    ----------
    vocab_size : int
        Columns of the logits.
    max_num_seqs : int
        Rows are numbered from 0 to ``max_num_seqs - 1``.
    device : torch.device
        Where the logits are.
    kernels : Backend
    processors : BatchProcessors, optional
        The engine's own.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        kernels: Backend,
        processors: BatchProcessors | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._kernels = kernels
        self._processors = BatchProcessors() if processors is None else processors
        self._rows: list[Row | None] = [None] * max_num_seqs
        self._needs = np.zeros(max_num_seqs, dtype=np.int64)
        self._waits = np.zeros(max_num_seqs, dtype=np.bool_)
        self._temperature = np.ones(max_num_seqs, dtype=np.float64)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float64)
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._num_logprobs = np.zeros(max_num_seqs, dtype=np.int64)

    def check(self, params: SamplingParams) -> None:
        """Refuse parameters that a processor of the engine does not take.

        Raises
        ------
        InvalidRequestError
        """
        self._processors.check(params)

    def add(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        eos_token_ids: Collection[int],
        bad_words_ids: Sequence[list[int]] = (),
        masked: bool = False,
    ) -> None:
        """Give a row to a sequence.

        Parameters
        ----------
        row : int
            One that no sequence has.
        params : SamplingParams
            Read now; not looked at again.
        seed : int
            Of this sequence alone. A token follows from it and from how many come before.
        prompt_token_ids : list of int
        output_token_ids : list of int
            The sequence's own list of generated tokens, which need not be empty. The caller
            appends to it after :meth:`sample` has returned.
        eos_token_ids : collection of int
            The model's end-of-sequence tokens.
        bad_words_ids : sequence of list of int
            Token sequences of ``params.bad_words``.
        masked : bool, default False
            Whether :meth:`sample` will be given a mask for it.

        Raises
        ------
        InvalidRequestError
            A logits processor takes the wrong number of arguments; the row stays free.
        ValueError
            The row is taken.
        """
        if self._rows[row] is not None:
            raise ValueError(f"row {row} is taken; remove its sequence first")
        state = Row(params, prompt_token_ids, output_token_ids, eos_token_ids, bad_words_ids)
        need = 0
        asked = params.logprobs
        if not state.is_plain:
            need |= _EDIT
        if masked:
            need |= _MASK
        if self._processors and self._processors.add(
            row, params, prompt_token_ids, output_token_ids
        ):
            need |= _PROCESSORS
        if params.use_beam_search:
            need |= _BEAMS
            asked = num_beam_candidates(params, eos_token_ids)
        elif not params.is_greedy:
            need |= _DRAW
        if asked is None and params.num_sequences > params.n:
            asked = 0  # the best are chosen by their cumulative log-probability
        if asked is not None:
            need |= _LOGPROBS
            asked = self._vocab_size if asked == -1 else min(asked, self._vocab_size)
        self._rows[row] = state
        self._needs[row] = need
        self._waits[row] = (
            bool(need & _WAITING)
            or state.processors is not None
            or params.repetition_penalty < _LEAST_REPETITION
        )
        self._temperature[row] = params.temperature
        self._top_k[row] = max(params.top_k, 0)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = seed % 2**64
        self._num_logprobs[row] = asked or 0

    def remove(self, row: int) -> None:
        """Take a row back from its sequence; a free row stays free."""
        self._rows[row] = None
        self._needs[row] = 0
        self._waits[row] = False
        if self._processors:
            self._processors.remove(row)

    def clear(self) -> None:
        """Take all rows back."""
        for row, state in enumerate(self._rows):
            if state is not None:
                self.remove(row)

    def close(self) -> None:
        """Let the engine's processors go."""
        self._processors.close()

    def needs_logits(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether any of the rows needs more than the likeliest token of its logits."""
        return bool(self._needs[rows].any())

    def can_launch(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether the rows' tokens can be chosen without the host seeing any of it.

        Not where a grammar, a beam search or a processor of logits has a say: see :meth:`launch`.
        """
        return not self._waits[rows].any()

    def take_likeliest(self, token_ids: torch.Tensor, highest: torch.Tensor) -> SamplerOutput:
        """Choose for rows that need no more than the likeliest token.

        Parameters
        ----------
        token_ids : Tensor[num_rows], int64
            The likeliest tokens.
        highest : Tensor[num_rows], float32
            Their logits; NaN where any of the row's is.
        """
        return outcome(token_ids.cpu().numpy(), highest.cpu().numpy())

    @torch.no_grad()
    def launch(self, logits: torch.Tensor, rows: npt.NDArray[np.int64]) -> PendingTokens:
        """Have one token per row chosen, without waiting for the device.

        What comes of it is what :meth:`sample` returns. The sequences' tokens are read now.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]
            Of each row's last token; not to be used again.
        rows : ndarray[num_rows], int64
            Whose they are, each at most once; such as :meth:`can_launch` allows.
        """
        if not self.can_launch(rows):
            raise ValueError("some of the rows can only be sampled while the host waits")
        needs = self._needs[rows]
        union = int(np.bitwise_or.reduce(needs)) if len(rows) else 0
        raw = edited = logits.float()
        token_ids, highest = self._kernels.argmax(raw)
        chosen_from = None
        if union & _EDIT:
            if union & _LOGPROBS:
                edited = raw.clone()
            self._edit(edited, rows, needs, None)
            token_ids, chosen_from = self._kernels.argmax(edited)
        if union & _DRAW:
            drawn = (needs & _DRAW) != 0
            if drawn.all() or self._device.type != "cpu":
                token_ids = self._draw(edited, rows, drawn)
            else:
                places = torch.from_numpy(np.flatnonzero(drawn))
                token_ids[places] = self._draw(edited[places], rows[drawn])
        logprobs = None
        if union & _LOGPROBS:
            logprobs = self._logprobs(raw, edited, rows, needs, token_ids)
        return PendingTokens(token_ids, highest, chosen_from, logprobs)

    @torch.no_grad()
    def sample(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int64], masks: Masks | None = None
    ) -> SamplerOutput:
        """Choose one token per row.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]
            Of each row's last token; not to be used again.
        rows : ndarray[num_rows], int64
            Whose they are; each row at most once.
        masks : Masks, optional
            What their grammars allow, of those that have one.

        Returns
        -------
        SamplerOutput
        """
        if self._device.type != "cpu" and masks is None and self.can_launch(rows):
            return self.launch(logits, rows).collect()
        needs = self._needs[rows]
        union = int(np.bitwise_or.reduce(needs)) if len(rows) else 0
        raw = logits.float()
        edited, failures = raw, {}
        if union & (_EDIT | _BEAMS | _MASK | _PROCESSORS):
            # A mask alone leaves to see what the model gave, where that matters.
            edited = raw.clone() if union & ~(_MASK | _DRAW) else raw
            failures = self._edit(edited, rows, needs, masks)
        token_ids = self._choose(raw, edited, rows, needs, failures)
        logprobs = None
        if union & _LOGPROBS:
            (chosen,) = upload([token_ids], raw.device)
            logprobs = self._logprobs(raw, edited, rows, needs, chosen)
        if failures:
            token_ids[list(failures)] = 0
        return SamplerOutput(token_ids, logprobs, failures)

    @torch.no_grad()
    def logprobs_for(
        self, logits: torch.Tensor, target_ids: torch.Tensor, k: int
    ) -> LogprobsTensors:
        """Return the log-probabilities of given tokens and of the likeliest ones.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size]
        target_ids : Tensor[num_rows], int64
        k : int
            How many of the likeliest; -1 is the whole vocabulary.
        """
        k = logits.shape[1] if k == -1 else min(k, logits.shape[1])
        return LogprobsTensors(*self._kernels.gather_logprobs(logits, target_ids, k))

    def _edit(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int64],
        needs: npt.NDArray[np.int64],
        masks: Masks | None,
    ) -> dict[int, BaseException]:
        beams = self._where(needs, _BEAMS)
        if len(beams):
            logits[beams] = self._kernels.log_softmax(logits[beams])
        if masks is not None:
            (masked,) = upload([masks.places], self._device)
            self._kernels.apply_bitmask(logits, masked, masks.bitmask)
        places = np.flatnonzero(needs & _EDIT).tolist()
        states = [state for place in places if (state := self._rows[rows[place]]) is not None]
        batchwise = (needs & _PROCESSORS).any()

        def process(failures: dict[int, BaseException]) -> dict[int, BaseException]:
            known = failures if masks is None else failures | masks.failures
            return self._processors.apply(logits, rows, known) if batchwise else {}

        failures = edit_logits(logits, states, places, self._kernels, process)
        if masks is not None:
            if batchwise or any(state.processors is not None for state in states):
                self._kernels.apply_bitmask(logits, masked, masks.bitmask)
            failures |= masks.failures
        return failures

    def _choose(
        self,
        raw: torch.Tensor,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int64],
        needs: npt.NDArray[np.int64],
        failures: dict[int, BaseException],
    ) -> npt.NDArray[np.int64]:
        """Return the chosen token of each row, adding rows that allow no choice to failures."""
        found, highest = self._kernels.argmax(logits)
        limits = highest.cpu().numpy()
        if not np.isfinite(limits).all():
            beams = set(np.flatnonzero(needs & _BEAMS).tolist())
            masked = set(np.flatnonzero(needs & _MASK).tolist()) if raw is logits else set()
            logits = _usable(raw, logits, limits, beams, masked, failures)
            found, _ = self._kernels.argmax(logits)
        drawn = (needs & _DRAW) != 0
        token_ids: npt.NDArray[np.int64]
        if drawn.all():
            token_ids = self._draw(logits, rows).cpu().numpy()
            return token_ids
        token_ids = found.cpu().numpy()
        if drawn.any():
            places = self._where(needs, _DRAW)
            token_ids[drawn] = self._draw(logits[places], rows[drawn]).cpu().numpy()
        return token_ids

    def _draw(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int64],
        drawn: npt.NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Draw a token for each row; for those not in ``drawn``, take the likeliest."""
        states = [self._rows[row] for row in rows.tolist()]
        lengths = [len(state.output_token_ids) for state in states if state is not None]
        uniform = uniforms(self._seeds[rows], np.array(lengths, dtype=np.int64))
        temperature, top_k = self._temperature[rows], self._top_k[rows]
        if drawn is not None:
            top_k[~drawn] = 1
        limits = upload(
            [temperature, top_k, self._top_p[rows], self._min_p[rows], uniform], self._device
        )
        return self._kernels.sample_tokens(logits, *limits)

    def _logprobs(
        self,
        raw: torch.Tensor,
        edited: torch.Tensor,
        rows: npt.NDArray[np.int64],
        needs: npt.NDArray[np.int64],
        token_ids: torch.Tensor,
    ) -> LogprobsTensors:
        counts = np.where(needs & _LOGPROBS, self._num_logprobs[rows], 0)
        is_beam = (needs & _BEAMS) != 0
        asks = ((needs & _LOGPROBS) != 0) & ~is_beam
        k = int(counts.max())
        if asks.all():
            return LogprobsTensors(*self._kernels.gather_logprobs(raw, token_ids, k))
        result = LogprobsTensors(
            torch.zeros(len(rows), k + 1, dtype=torch.int64, device=raw.device),
            torch.full((len(rows), k + 1), -torch.inf, dtype=torch.float32, device=raw.device),
            torch.zeros(len(rows), dtype=torch.int64, device=raw.device),
        )
        if asks.any():
            (places,) = upload([np.flatnonzero(asks)], raw.device)
            width = int(counts[asks].max())
            found = self._kernels.gather_logprobs(raw[places], token_ids[places], width)
            result.token_ids[places, : width + 1] = found[0]
            result.logprobs[places, : width + 1] = found[1]
            result.ranks[places] = found[2]
        if is_beam.any():
            places = self._where(needs, _BEAMS)
            width = int(counts[is_beam].max())
            logprobs, ids = self._kernels.top_logits(edited[places], width)
            result.token_ids[places, : width + 1] = torch.cat((ids[:, :1], ids), dim=1)
            result.logprobs[places, : width + 1] = torch.cat((logprobs[:, :1], logprobs), dim=1)
            result.ranks[places] = 1
        return result

    def _where(self, needs: npt.NDArray[np.int64], need: int) -> torch.Tensor:
        return upload([np.flatnonzero(needs & need)], self._device)[0]


def _usable(
    raw: torch.Tensor,
    logits: torch.Tensor,
    highest: npt.NDArray[np.float32],
    beams: set[int],
    masked: set[int],
    failures: dict[int, BaseException],
) -> torch.Tensor:
    """Return logits, changed where nothing can be chosen by them, adding such rows to failures.

    A row in which a processor made logits infinite is left with just these tokens. A beam that
    has no continuation is no failure: others of its search may have. In ``masked`` rows, ``raw``
    is what a mask has left.
    """
    logits = logits.clone()
    for place in np.flatnonzero(~np.isfinite(highest)).tolist():
        top = float(raw[place].amax())
        if place in failures:
            pass
        elif not math.isfinite(top) and not (top == -math.inf and place in masked):
            failures[place] = model_error(top)
        elif highest[place] == torch.inf:
            forced = logits[place] == torch.inf
            logits[place] = torch.where(forced, 0.0, -torch.inf)
            continue
        elif place not in beams:
            failures[place] = nothing_allowed()
        logits[place] = 0.0
    return logits
