"""LogitsProcessor: what an engine's own logits processors are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import torch

    from quire.sampling_params import SamplingParams


class LiveTokens(Sequence[int]):
    """A list of tokens that can be read and not changed, and that grows as its sequence does.

    Parameters
    ----------
    tokens : list of int
    """

    __slots__ = ("_tokens",)

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens[index]

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __repr__(self) -> str:
        return repr(self._tokens)


@dataclass(frozen=True, slots=True)
class AddedRow:
    """A sequence that a processor is to serve from now on.

    Attributes
    ----------
    row : int
        Its number. No two sequences have one at the same time; once it is removed, another may
        be given it.
    params : SamplingParams
        Of its request, with what the request has for this processor in ``extra_args``. Not to be
        changed.
    prompt_token_ids : sequence of int
    output_token_ids : sequence of int
        Its generated tokens, live: what is read in a later :meth:`LogitsProcessor.apply` has the
        tokens that have come since. Not empty where a sequence goes on that was interrupted, or
        where a beam branches off.
    """

    row: int
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class BatchChange:
    """Which sequences have come and gone.

    Attributes
    ----------
    removed : tuple of int
        Rows whose sequences have ended, failed, or been interrupted. They left before those of
        ``added`` came, which may have their numbers.
    added : tuple of AddedRow
    """

    removed: tuple[int, ...] = ()
    added: tuple[AddedRow, ...] = ()


class LogitsProcessor(ABC):
    """Changes the logits of all sequences of a step in one call.

    A subclass, or an instance of one, is registered with an engine's argument
    ``logits_processors``. A class is instantiated by the engine, without arguments; an instance
    serves one engine at a time. All methods are called on the engine's thread, one at a time.

    A row's logits must follow from that row's own parameters and tokens: then a request's answer
    does not depend on which others are computed beside it. A processor comes after the requests'
    own ``logits_processors`` and before penalties; where a request has ``structured_outputs``,
    what its grammar forbids stays forbidden. In a beam search it is given log-probabilities.

    **When something is raised.** If :meth:`apply` raises, or does not return what it should, it
    is called again with each row alone, on the logits as they were: only the requests for which
    that fails, too, end with the error, and the others go on with what they were given. If
    :meth:`update` raises, it is told of the removal of all rows that the change had added, and
    then of each of them alone: the requests for which that fails, too, end with the error. Of a
    removal that fails the log has a warning.

    Attributes
    ----------
    rows : list of int
        Set by the engine before each :meth:`apply`: the row to which each line of the logits
        belongs. It has some of the rows that were added and not removed, in any order.

    Examples
    --------
    Tokens that a request bans by ``SamplingParams(extra_args={"banned": [5, 7]})``:

    >>> class Ban(quire.LogitsProcessor):
    ...     def __init__(self):
    ...         self.banned = {}
    ...
    ...     def concerns(self, params):
    ...         return bool(params.extra_args and params.extra_args.get("banned"))
    ...
    ...     def update(self, change):
    ...         for row in change.removed:
    ...             self.banned.pop(row, None)
    ...         for added in change.added:
    ...             self.banned[added.row] = added.params.extra_args["banned"]
    ...
    ...     def apply(self, logits):
    ...         for line, row in zip(logits, self.rows):
    ...             line[self.banned[row]] = -torch.inf
    ...         return logits
    >>> llm = quire.LLM("quire/demo", logits_processors=[Ban])
    """

    rows: Sequence[int] = ()

    def concerns(self, params: SamplingParams) -> bool:
        """Return whether requests with these parameters are to be served; all are, unless defined.

        A processor is told nothing of the others, whose logits it does not see and which cost
        nothing. What this raises refuses the request: it is the place to check ``extra_args``.

        Parameters
        ----------
        params : SamplingParams
            Not to be changed. The answer must follow from them.
        """
        return True

    @abstractmethod
    def update(self, change: BatchChange) -> None:
        """Take note of sequences that have come and gone.

        Called before :meth:`apply` when there is something to tell, and when the last sequence
        has gone. Each row that was added is removed once, whatever becomes of its request;
        ``removed`` may have rows whose addition had raised.

        Parameters
        ----------
        change : BatchChange
        """

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what becomes of the logits of a step.

        It should not depend on how often it is called: a step's call may be repeated.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
            Of the sequences in ``rows``, in that order. May be changed in place, and is good for
            this call: what is to be kept is to be copied.

        Returns
        -------
        Tensor[num_rows, vocab_size], float32
            Without NaN. ``-inf`` forbids a token.
        """
