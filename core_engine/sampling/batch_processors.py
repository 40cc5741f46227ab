"""BatchProcessors: an engine's own logits processors, and what each is told."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import ConfigError, InvalidRequestError, QuireError
from quire.logits_processor import AddedRow, BatchChange, LiveTokens, LogitsProcessor
from quire.sampling_params import SamplingParams
from quire.utils import log
from quire.utils.checks import described

logger = log.get_logger()

Failures = dict[int, BaseException]
"""Why requests cannot go on, by the place of their row in a step's logits."""

_OWNERS: dict[int, weakref.ref[BatchProcessors]] = {}
"""Who has an instance, by its id; the owner keeps it alive."""

_LOCK = threading.Lock()


class _Spare:
    """Room for a step's logits as they were, kept from step to step: new memory is slow."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None

    def hold(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a copy, good until the next call."""
        if self._room is None or len(self._room) < len(logits):
            self._room = torch.empty_like(logits)
        return self._room[: len(logits)].copy_(logits)


class _Registered:
    """One processor, and the rows it serves.

    Attributes
    ----------
    rows : dict of int to AddedRow
        All that it concerns.
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor
        self.name = type(processor).__qualname__
        self.rows: dict[int, AddedRow] = {}
        self._told: set[int] = set()
        self._added: dict[int, AddedRow] = {}
        self._removed: list[int] = []
        self._failed: Failures = {}

    def add(self, row: AddedRow) -> None:
        self.rows[row.row] = self._added[row.row] = row

    def fail(self, row: AddedRow, error: BaseException) -> None:
        """Take a row of which the processor is told nothing, to report it as failed."""
        self.rows[row.row] = row
        self._failed[row.row] = error

    def remove(self, row: int) -> None:
        if self.rows.pop(row, None) is None:
            return
        self._added.pop(row, None)
        self._failed.pop(row, None)
        if row in self._told:
            self._told.remove(row)
            self._removed.append(row)
        if not self.rows:
            self._tell()  # nobody may come for a long time, and tokens would be kept

    def apply(
        self, logits: torch.Tensor, rows: Sequence[int], skipped: Collection[int], spare: _Spare
    ) -> Failures:
        """Change the lines of the rows that it concerns; return those that failed."""
        self._tell()
        places = [i for i, row in enumerate(rows) if row in self.rows and i not in skipped]
        failures = {i: self._failed[rows[i]] for i in places if rows[i] in self._failed}
        places = [place for place in places if place not in failures]
        if not places:
            return failures
        whole = len(places) == len(logits)
        before = spare.hold(logits) if whole else logits  # to begin again from
        index = torch.tensor(places, device=logits.device)
        given = logits[:] if whole else logits[index]  # to be bent without bending ours
        try:
            result = self._call(given, [rows[place] for place in places])
            if result.amax(dim=1).isnan().any():
                raise self._wrong(given, "NaN")
        except Exception:
            if whole:
                logits.copy_(before)
            return failures | self._apply_alone(logits, rows, places)
        if not whole:
            logits[index] = result
        elif result.data_ptr() != logits.data_ptr() or result.stride() != logits.stride():
            logits.copy_(result)
        return failures

    def _apply_alone(
        self, logits: torch.Tensor, rows: Sequence[int], places: Iterable[int]
    ) -> Failures:
        failures: Failures = {}
        for place in places:
            line = logits[place : place + 1]
            try:
                if line.amax().isnan():
                    raise QuireError("the model produced NaN logits")
                result = self._call(line.clone(), [rows[place]])
                if result.amax().isnan():
                    raise self._wrong(line, "NaN")
                line.copy_(result)
            except Exception as error:
                failures[place] = error
        return failures

    def _call(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Return what the processor makes of some rows; NaN is for the caller to look for."""
        shape, dtype, device = logits.shape, logits.dtype, logits.device
        try:
            self.processor.rows = rows
            result: Any = self.processor.apply(logits)
        except BaseException as error:  # also SystemExit: it must not end the engine
            raise self._raised("apply", error) from error
        if not isinstance(result, torch.Tensor):
            raise self._wrong(logits, type(result).__name__)
        if result.shape != shape or result.dtype != dtype:
            kind = str(result.dtype).removeprefix("torch.")
            raise self._wrong(logits, f"{kind} of shape {tuple(result.shape)}")
        if result.device != device:
            raise self._wrong(logits, f"one on {result.device} instead of {device}")
        if result.layout != torch.strided:
            raise self._wrong(logits, f"one of layout {result.layout}")
        return result.detach()

    def _tell(self) -> None:
        """Tell the processor what it does not know yet."""
        if not self._added and not self._removed:
            return
        added = tuple(self._added.values())
        change = BatchChange(tuple(self._removed), added)
        self._added.clear()
        self._removed.clear()
        self._told.update(row.row for row in added)
        error = self._update(change)
        if error is None:
            return
        if not added:
            self._warn(error)
            return
        # Which of them it was does not show, nor what became of the others.
        if (undone := self._update(BatchChange(tuple(row.row for row in added)))) is not None:
            self._warn(undone)
        alone = {row.row: self._update(BatchChange((), (row,))) for row in added}
        self._failed |= {row: why for row, why in alone.items() if why is not None}
        if not self._failed.keys() & alone.keys():
            self._warn(error)  # then it was the removal of others

    def _update(self, change: BatchChange) -> BaseException | None:
        try:
            self.processor.update(change)
        except BaseException as error:  # also SystemExit: it must not end the engine
            failure = self._raised("update", error)
            failure.__cause__ = error
            return failure
        return None

    def _warn(self, error: BaseException) -> None:
        logger.warning("rows were removed, and %s", error, exc_info=error)

    def _raised(self, method: str, error: BaseException) -> InvalidRequestError:
        return InvalidRequestError(
            f"logits processor {self.name}.{method} raised {described(error)}"
        )

    def _wrong(self, logits: torch.Tensor, got: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"logits processor {self.name}.apply must return a float32 tensor of shape "
            f"{tuple(logits.shape)} without NaN, got {got}"
        )


class BatchProcessors:
    """The logits processors that an engine was made with, in the order they are applied.

    Parameters
    ----------
    processors : iterable of LogitsProcessor or type
        A class is instantiated.

    Raises
    ------
    ConfigError
        A class that cannot be instantiated, or an instance that is registered already.
    """

    def __init__(self, processors: Iterable[LogitsProcessor | type[LogitsProcessor]] = ()) -> None:
        self._registered: list[_Registered] = []
        self._spare = _Spare()
        made = [_instance(processor) for processor in processors]
        with _LOCK:
            for processor in made:
                owner = _OWNERS.get(id(processor), lambda: None)()
                if owner is not None:
                    self._release()
                    raise ConfigError(
                        f"logits_processors: this {type(processor).__qualname__} is registered "
                        "already, and an instance knows the rows of one engine; give a new one, "
                        "or the class"
                    )
                _OWNERS[id(processor)] = weakref.ref(self)
                self._registered.append(_Registered(processor))

    def __bool__(self) -> bool:
        return bool(self._registered)

    def check(self, params: SamplingParams) -> None:
        """Refuse a request that a processor does not take.

        Raises
        ------
        InvalidRequestError
            ``concerns`` of a processor raised; its exception is the cause.
        """
        for registered in self._registered:
            _concerns(registered, params)

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
    ) -> bool:
        """Enter a row; return whether any processor serves it."""
        added = AddedRow(row, params, LiveTokens(prompt_token_ids), LiveTokens(output_token_ids))
        served = False
        for registered in self._registered:
            try:
                if not _concerns(registered, params):
                    continue
                registered.add(added)
            except InvalidRequestError as error:
                registered.fail(added, error)
            served = True
        return served

    def remove(self, row: int) -> None:
        """Let a row go; one that was not entered is passed over."""
        for registered in self._registered:
            registered.remove(row)

    def apply(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int64], skipped: Collection[int]
    ) -> Failures:
        """Change the logits of a step in place.

        Parameters
        ----------
        logits : Tensor[num_rows, vocab_size], float32
        rows : ndarray[num_rows], int64
            Whose they are.
        skipped : collection of int
            Places of rows that have failed before.

        Returns
        -------
        dict of int to BaseException
            By place, the rows that failed; what their logits are is left open.
        """
        numbers = rows.tolist()
        failures: Failures = {}
        for registered in self._registered:
            failures |= registered.apply(logits, numbers, {*skipped, *failures}, self._spare)
        return failures

    def close(self) -> None:
        """Remove what rows there are, and let other engines have the instances."""
        for registered in self._registered:
            for row in list(registered.rows):
                registered.remove(row)
        with _LOCK:
            self._release()

    def _release(self) -> None:
        for registered in self._registered:
            _OWNERS.pop(id(registered.processor), None)
        self._registered = []


def _instance(processor: LogitsProcessor | type[LogitsProcessor]) -> LogitsProcessor:
    if not isinstance(processor, type):
        return processor
    try:
        return processor()
    except Exception as error:
        raise ConfigError(
            f"logits_processors: {processor.__qualname__}() raised {type(error).__name__}: "
            f"{error}; a class is instantiated without arguments, where it needs some give an "
            "instance"
        ) from error


def _concerns(registered: _Registered, params: SamplingParams) -> bool:
    try:
        return bool(registered.processor.concerns(params))
    except BaseException as error:  # also SystemExit: its request is to fail alone
        raise InvalidRequestError(
            f"logits processor {registered.name} refused the request: {described(error)}"
        ) from error
