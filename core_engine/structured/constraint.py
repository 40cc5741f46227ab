"""Constraint: what a sampler asks of a grammar, whichever library answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from quire.structured_outputs import ConstraintSpec


class Constraint(Protocol):
    """Where one sequence stands in its grammar.

    Only tokens of text are looked at: those that end a sequence are the engine's affair, which
    lets them through where :meth:`is_accepting` holds. Used by one thread at a time.
    """

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next.

        Parameters
        ----------
        row : ndarray[num_words], int32
            Overwritten: bit ``i % 32`` of word ``i // 32`` is 1 where token ``i`` may. It has
            :attr:`Vocabulary.num_words <quire.structured.vocabulary.Vocabulary.num_words>`.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens.

        Raises
        ------
        InvalidRequestError
            One of them may not follow.
        """

    def rollback(self, n: int) -> None:
        """Take back the last ``n`` tokens that were accepted."""

    def forced_tokens(self) -> list[int]:
        """Return how the tokenizer writes the text that must follow, as far as it is certain."""

    def is_accepting(self) -> bool:
        """Whether the text may end here."""

    def is_finished(self) -> bool:
        """Whether the text may end here, and nothing else."""

    def copy(self) -> Constraint:
        """Return an independent one that stands at the same place."""


class CompiledConstraint(Protocol):
    """A grammar, made ready for a vocabulary."""

    def start(self) -> Constraint:
        """Return a constraint at the beginning of a text."""


class ConstraintBackend(Protocol):
    """A library that enforces constraints on the tokens of one vocabulary."""

    def compile(self, spec: ConstraintSpec) -> CompiledConstraint:
        """Make a constraint ready.

        Raises
        ------
        InvalidRequestError
            The library refuses it, or cannot enforce all of it.
        """
