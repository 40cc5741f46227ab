"""RankRunner: what one rank does of a step, beside the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.batch import ForwardBatch
from quire.executor.pieces import split_batch

if TYPE_CHECKING:
    from quire.engine.runner import ModelRunner
    from quire.parallel.fabric import Ends
    from quire.parallel.place import Place

_LEAST_TOKENS = 64
"""Of a piece: with fewer, reading the weights once more costs what the stages gain."""


@dataclass
class RankRunner:
    """A rank's part of the model, its KV cache, and its connections to the other ranks.

    All ranks call the same methods with the same arguments; rank 0 gets the results.

    Attributes
    ----------
    runner : ModelRunner
    place : Place
    ends : Ends
    """

    runner: ModelRunner
    place: Place
    ends: Ends

    def __post_init__(self) -> None:
        model = self.runner.model
        self._hidden_size = model.spec.hidden_size
        self._vocab_size = model.spec.vocab_size
        self._dtype = torch.float32 if model.native is not None else model.weights.dtype
        self._hidden: torch.Tensor | None = None  # of the last step, where logits are made

    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Compute a step.

        A long one goes through the stages in pieces, so that none of them waits for all of it.

        Returns
        -------
        Tensor[num_tokens, hidden_size] or None
            After the final norm; None on ranks that do not get it.
        """
        if self.place.num_stages == 1:
            self._hidden = self.runner.forward(batch)
            return self._hidden
        count = min(self.place.num_stages, max(1, batch.num_tokens // _LEAST_TOKENS))
        made = []
        for piece in split_batch(batch, count):
            hidden = None
            if self.ends.before is not None:
                shape = (piece.num_tokens, self._hidden_size)
                hidden = self.ends.before.receive(shape, self._dtype).to(self.runner.device)
            hidden = self.runner.forward(piece, hidden)
            if self.ends.after is not None:
                self.ends.after.send(hidden)
            else:
                made.append(hidden)
        if made:
            self._hidden = torch.cat(made)
        # Not before all is done: who waits for it has to send all of its own first.
        return self._bring_home(self._hidden, (batch.num_tokens, self._hidden_size), self._dtype)

    def logits(
        self, indices: torch.Tensor, adapter_slots: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Compute the logits after some tokens of the last step; see `ModelRunner.logits`."""
        whole = None
        if self.place.is_last_stage:
            assert self._hidden is not None
            part = self.runner.logits(self._hidden, indices, adapter_slots)
            if self.ends.group is None:
                whole = part
            else:
                # Of equal widths: the last rank's may be less.
                width = -(-self._vocab_size // self.place.tensor_size // 16) * 16
                padded = torch.nn.functional.pad(part, (0, width - part.shape[1]))
                every = self.ends.group.gather(padded)
                if every is not None:
                    whole = every.transpose(0, 1).flatten(1)[:, : self._vocab_size].contiguous()
        return self._bring_home(whole, (len(indices), self._vocab_size), torch.float32)

    def likeliest(
        self, indices: torch.Tensor, adapter_slots: torch.Tensor | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """Find the likeliest tokens after some tokens of the last step."""
        found = None
        if self.place.is_last_stage:
            assert self._hidden is not None
            ids, highest = self.runner.likeliest(self._hidden, indices, adapter_slots)
            # Exact in this type, both of them.
            found = torch.from_numpy(np.stack([ids.astype(np.float64), highest]))
            if self.ends.group is not None:
                every = self.ends.group.gather(found)
                found = None if every is None else _highest_of(every)
        found = self._bring_home(found, (2, len(indices)), torch.float64)
        if found is None:
            return None
        ids, highest = found.numpy()
        return ids.astype(np.int64), highest.astype(np.float32)

    def _bring_home(
        self, result: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Hand a result of the last stage's first rank to the first stage's."""
        if self.ends.home is None or self.place.num_stages == 1:
            return result
        if self.place.is_last_stage:
            assert result is not None
            self.ends.home.send(result)
            return None
        return self.ends.home.receive(shape, dtype)


def _highest_of(every: torch.Tensor) -> torch.Tensor:
    """Choose, ``[size, 2, num_rows] -> [2, num_rows]``: the lowest id among equals, or no number."""
    highest = every[:, 1]
    # A rank's logits that are no number make the row's so; `argmax` takes the first such.
    best = torch.where(highest.isnan(), torch.inf, highest).argmax(0)
    best = torch.where(highest.isnan().any(0), highest.isnan().int().argmax(0), best)
    return every.gather(0, best.expand(1, 2, -1))[0]
