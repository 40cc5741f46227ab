"""PoolingParams: how a prompt's hidden states become one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quire.utils.checks import flag, integer, refuse
from quire.utils.keywords import refuse_unknown_keywords

POOLINGS: Final = ("last", "mean", "cls")


@refuse_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How a prompt's hidden states, those after the model's last norm, become one vector.

    Parameters
    ----------
    pooling : {"last", "mean", "cls"}, optional
        The state of the last token (the default: the only one that has seen all of a prompt in a
        model that generates), the mean of all, or the state of the first.
    normalize : bool, default True
        Divide the vector by its length, so that the dot product of two is their cosine.
    dimensions : int, optional
        Keep that many of the first numbers only, before they are normalized.
    truncate_prompt_tokens : int, optional
        Keep that many of the prompt's last tokens; -1 as many as there is room for.

    Raises
    ------
    InvalidRequestError
        For a value out of its range.
    """

    pooling: str | None = None
    normalize: bool = True
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise refuse("pooling", self.pooling, f"one of {', '.join(map(repr, POOLINGS))}")
        flag("normalize", self.normalize)
        if self.dimensions is not None:
            integer("dimensions", self.dimensions, "an integer of at least 1, or None", 1)

    def check(self, hidden_size: int) -> None:
        """Refuse more dimensions than a model has.

        Raises
        ------
        InvalidRequestError
        """
        if self.dimensions is not None and self.dimensions > hidden_size:
            expected = f"at most {hidden_size}, the model's hidden size"
            raise refuse("dimensions", self.dimensions, expected)
