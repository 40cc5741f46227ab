"""RankRunner: what one rank does of a step, beside the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from quire.engine.batch import ForwardBatch
from quire.executor.pieces import count_pieces, split_batch

if TYPE_CHECKING:
    from quire.engine.runner import ModelRunner
    from quire.models.adapter import PreparedAdapter
    from quire.parallel.fabric import Ends
    from quire.parallel.group import Exchanged
    from quire.parallel.place import Place


@dataclass
class RankRunner:
    """A rank's part of the model, its KV cache, and its connections to the other ranks.

    All ranks call the same methods with the same arguments. Rank 0 gets the results, the others
    None, or all of them do: then it is what an engine on every rank steps.

    Attributes
    ----------
    own : ModelRunner
    place : Place
    ends : Ends
    everywhere : bool
        Whether all ranks get the results.
    at_end : callable
        What `close` calls.
    """

    can_go_ahead: ClassVar[bool] = False

    own: ModelRunner
    place: Place
    ends: Ends
    everywhere: bool = False
    at_end: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.device = self.own.device
        model = self.own.model
        self.model = model
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
            self._hidden = self.own.forward(batch)
            return self._hidden
        count = count_pieces(batch.num_tokens, self.place.num_stages)
        made = []
        for piece in split_batch(batch, count):
            hidden = None
            if self.ends.before is not None:
                shape = (piece.num_tokens, self._hidden_size)
                # As stages leave it, whatever the model's type is; see `Decoder.forward`.
                hidden = self.ends.before.receive(shape, torch.float32).to(self.own.device)
            hidden = self.own.forward(piece, hidden)
            if self.ends.after is not None:
                self.ends.after.send(hidden)
            else:
                made.append(hidden)
        if made:
            self._hidden = torch.cat(made)
        # Not before all is done: who waits for it has to send all of its own first.
        return self._bring_home(self._hidden, (batch.num_tokens, self._hidden_size), self._dtype)

    def logits(
        self,
        hidden: torch.Tensor | None,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Compute the logits after some tokens of the last step; see `ModelRunner.logits`.

        Parameters
        ----------
        hidden
            What `forward` returned, or some rows of it side by side; None: what it returned.
        indices, adapter_slots
        """
        indices = of_step(hidden, indices)
        whole = None
        if self.place.is_last_stage:
            assert self._hidden is not None
            part = self.own.logits(self._hidden, indices, adapter_slots)
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
        self,
        hidden: torch.Tensor | None,
        indices: torch.Tensor,
        adapter_slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the likeliest tokens after some tokens of the last step; see `logits`."""
        indices = of_step(hidden, indices)
        found = None
        if self.place.is_last_stage:
            assert self._hidden is not None
            ids, highest = self.own.likeliest(self._hidden, indices, adapter_slots)
            # Both of them exactly: ids are below 2^24.
            found = torch.stack([ids.float(), highest])
            if self.ends.group is not None:
                every = self.ends.group.gather(found)
                found = None if every is None else _highest_of(every)
        found = self._bring_home(found, (2, len(indices)), torch.float32)
        if found is None:
            return None
        return found[0].long(), found[1]

    def _bring_home(
        self, result: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Hand a result that the last stage's first rank has to who gets it."""
        place, ends = self.place, self.ends
        if self.everywhere and place.is_last_stage and ends.group is not None:
            if result is None:
                result = torch.zeros(shape, dtype=dtype, device=self.device)
            elif place.tensor_rank > 0:
                result = torch.zeros_like(result)
            result = ends.group.reduce(result)
        if place.num_stages == 1:
            return result
        if not self.everywhere and place.tensor_rank > 0:
            return None
        if place.is_last_stage:
            assert result is not None
            assert ends.home is not None
            ends.home.send(result)
        elif place.is_first_stage or self.everywhere:
            source = ends.home if place.is_first_stage else ends.before
            assert source is not None
            result = source.receive(shape, dtype)
            if self.everywhere and place.stage < place.num_stages - 2:
                assert ends.after is not None
                ends.after.send(result)
        return result

    def set_adapter(self, slot: int, adapter: PreparedAdapter | None) -> None:
        """See `ModelRunner.set_adapter`."""
        self.own.set_adapter(slot, adapter)

    def make_host_cache(self, num_bytes: float) -> None:
        """See `ModelRunner.make_host_cache`; there is none for several ranks."""

    def exchanged(self) -> Exchanged | None:
        """See `ModelRunner.exchanged`."""
        return None if self.ends.exchanged is None else self.ends.exchanged()

    def close(self) -> None:
        """Let go of the other ranks."""
        self.at_end()


def of_step(hidden: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor:
    """Turn places among some rows of a step's hidden states into places among all of them."""
    if hidden is None:
        return indices
    first = hidden.storage_offset() // hidden.shape[-1]
    return indices + first if first else indices


def _highest_of(every: torch.Tensor) -> torch.Tensor:
    """Choose, ``[size, 2, num_rows] -> [2, num_rows]``: the lowest id of equals, or no number."""
    highest = every[:, 1]
    # A rank's logits that are no number make the row's so.
    best = torch.where(highest.isnan(), torch.inf, highest).argmax(0)
    best = torch.where(highest.isnan().any(0), highest.isnan().int().argmax(0), best)
    return every.gather(0, best.expand(1, 2, -1))[0]
