"""A request's own logits processors: callables that somebody else wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from quire.errors import InvalidRequestError
from quire.utils.checks import described, shown

RowProcessor = Callable[..., torch.Tensor]
"""``f(token_ids, logits)`` or ``f(prompt_token_ids, token_ids, logits)``, returning logits."""


class SequenceState(Protocol):
    """What is given in place of a callable that keeps state, of which each sequence has its own."""

    def for_sequence(self) -> RowProcessor:
        """Return the callable of a sequence.

        It is called for that sequence alone, as any other, with all that was generated so far:
        mostly one token more than the last time. More at the first call are those of a sequence
        that was interrupted and goes on, or of a beam that branched off.
        """
        ...


def check_processors(processors: Sequence[RowProcessor | SequenceState]) -> None:
    """Refuse what cannot be called as a logits processor, as far as that shows before.

    Raises
    ------
    InvalidRequestError
        A callable that takes neither two nor three arguments.
    """
    for processor in processors:
        if _factory(processor) is None:
            takes_prompt(cast(RowProcessor, processor))


def takes_prompt(processor: RowProcessor) -> bool:
    """Return whether a processor is to be called with the prompt's token ids first.

    Parameters
    ----------
    processor : callable
        Of two positional arguments or, with the prompt's token ids, of three.

    Raises
    ------
    InvalidRequestError
        It can be called with neither number.
    """
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # written in C and silent about its arguments
        return False
    for count in (2, 3):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 3
    raise InvalidRequestError(
        f"each of logits_processors must be callable as f(token_ids, logits) or "
        f"f(prompt_token_ids, token_ids, logits), got {_name(processor)}{signature}"
    )


class LogitsProcessors:
    """The processors of one request, in the order they are applied.

    Parameters
    ----------
    processors : sequence of callable, or of objects with ``for_sequence``
    prompt_token_ids : list of int
        Handed, as a copy, to processors of three arguments.

    Raises
    ------
    InvalidRequestError
        A processor takes neither two nor three arguments.
    """

    def __init__(
        self,
        processors: Sequence[RowProcessor | SequenceState],
        prompt_token_ids: Sequence[int],
    ) -> None:
        check_processors(processors)
        self._given = processors
        self._processors: list[tuple[RowProcessor, bool]] | None = None
        self._prompt_token_ids = prompt_token_ids

    def __call__(self, token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Return the logits that the processors make of a row.

        Parameters
        ----------
        token_ids : sequence of int
            Generated so far. Each processor gets a list of its own, which it may keep.
        logits : Tensor[vocab_size], float32
            May be changed in place.

        Raises
        ------
        InvalidRequestError
            A processor raised (its exception is the cause), or returned something else than
            such logits.
        """
        if self._processors is None:
            # Not before: what is raised here is to fail the request, and nothing else.
            self._processors = [_start(processor) for processor in self._given]
        for processor, with_prompt in self._processors:
            history = [list(self._prompt_token_ids)] if with_prompt else []
            try:
                result = processor(*history, list(token_ids), logits)
            except BaseException as error:  # also SystemExit: its request is to fail alone
                raise InvalidRequestError(
                    f"logits processor {_name(processor)} raised {described(error)}"
                ) from error
            logits = _checked(processor, result, logits)
        return logits


def _factory(processor: RowProcessor | SequenceState) -> Callable[[], RowProcessor] | None:
    # A class has the method, too, and is no object that could be asked.
    factory = None if isinstance(processor, type) else getattr(processor, "for_sequence", None)
    return factory if callable(factory) else None


def _start(processor: RowProcessor | SequenceState) -> tuple[RowProcessor, bool]:
    """Return the callable of one sequence, and whether it takes the prompt."""
    factory = _factory(processor)
    if factory is None:
        own = cast(RowProcessor, processor)
        return own, takes_prompt(own)
    try:
        own = factory()
    except BaseException as error:  # also SystemExit: its request is to fail alone
        raise InvalidRequestError(
            f"logits processor {_name(processor)}.for_sequence raised {described(error)}"
        ) from error
    if not callable(own):
        raise InvalidRequestError(
            f"logits processor {_name(processor)}.for_sequence must return a callable, got "
            f"{type(own).__name__}"
        )
    return own, takes_prompt(own)


def _checked(processor: RowProcessor, result: Any, logits: torch.Tensor) -> torch.Tensor:
    expected = f"a float32 tensor of shape {tuple(logits.shape)} without NaN"
    if not isinstance(result, torch.Tensor):
        got = type(result).__name__
    elif result.shape != logits.shape or result.dtype != logits.dtype:
        kind = str(result.dtype).removeprefix("torch.")
        got = f"{kind} of shape {tuple(result.shape)}"
    elif result.device != logits.device:
        got = f"one on {result.device} instead of {logits.device}"
    elif result.layout != logits.layout:
        got = f"one of layout {result.layout}"
    elif result.detach().amax().isnan():
        got = "NaN"
    else:
        return result.detach()
    raise InvalidRequestError(
        f"logits processor {_name(processor)} must return {expected}, got {got}"
    )


def _name(processor: RowProcessor | SequenceState) -> str:
    name = getattr(processor, "__qualname__", None)
    return name if isinstance(name, str) else shown(processor)
