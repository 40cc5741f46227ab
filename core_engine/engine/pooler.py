"""Pooler: the hidden states of a prompt, as they are computed, to one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quire.pooling_params import PoolingParams


class Pooler:
    """Takes the states of one prompt, part by part and in order.

    Parameters
    ----------
    params : PoolingParams
    num_tokens : int
        Of the prompt.
    """

    def __init__(self, params: PoolingParams, num_tokens: int) -> None:
        self._params = params
        self._num_tokens = num_tokens
        self._kind = params.pooling or "last"
        self._num_read = 0
        self._state: torch.Tensor | None = None

    @property
    def reads_all(self) -> bool:
        """Whether it needs more than the last token's state."""
        return self._kind != "last"

    def add(self, hidden: torch.Tensor, first: int) -> None:
        """Take states.

        Parameters
        ----------
        hidden : Tensor[num_tokens, hidden_size]
        first : int
            The position of the first of them in the prompt; what was read before, and is computed
            anew after a preemption, is passed over.
        """
        hidden = hidden[max(self._num_read - first, 0) : self._num_tokens - first]
        if len(hidden) == 0:
            return
        start = max(self._num_read, first)
        self._num_read = start + len(hidden)
        if self._kind == "mean":
            total = hidden.sum(0, dtype=torch.float32)
            self._state = total if self._state is None else self._state + total
        elif self._kind == "last":
            if self._num_read == self._num_tokens:
                self._state = hidden[-1].to(torch.float32, copy=True)
        elif start == 0:
            self._state = hidden[0].to(torch.float32, copy=True)

    def vector(self) -> list[float]:
        """Return the vector, once all of the prompt was read."""
        assert self._state is not None
        assert self._num_read == self._num_tokens
        state = self._state / self._num_tokens if self._kind == "mean" else self._state
        state = state[: self._params.dimensions]
        if not state.isfinite().all():
            raise ArithmeticError("the model gave hidden states that are no finite numbers")
        if self._params.normalize:
            state = torch.nn.functional.normalize(state, dim=0)
        values: list[float] = state.tolist()
        return values
