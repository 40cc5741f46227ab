"""Masks: what they and their grammars cost by library, over texts that all walk through alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from quire.bench.cases import Case
from quire.errors import InvalidRequestError
from quire.structured_outputs import BACKENDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from quire.structured.constraint import CompiledConstraint, ConstraintBackend
    from quire.structured.vocabulary import Vocabulary

DEADLINE_SECONDS = 10.0
"""For a compilation, as an engine has it unless told otherwise."""

_MEMORY_BYTES = 64 << 20
"""Read between steps, as a model's weights are: the processor keeps little of a grammar then."""


@dataclass(slots=True)
class Library:
    """What one library showed.

    Attributes
    ----------
    name, version : str
    why_missing : str or None
        Why it took no part.
    ready_seconds : float
        From the vocabulary to a library that can compile.
    refused : dict of str to str
        The reason, by case.
    compile_seconds : dict of str to list of float
        By case, of each run.
    mask_seconds, accept_seconds : dict of str to list of list of float
        By case, of each run's rows: to fill a mask, and to go on by a token.
    num_texts, num_refused : int
        Texts that rows began, and how many of them were refused, though they match.
    """

    name: str
    version: str = ""
    why_missing: str | None = None
    ready_seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    compile_seconds: dict[str, list[float]] = field(default_factory=dict)
    mask_seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    accept_seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    num_texts: int = 0
    num_refused: int = 0

    def compile_percentile(self, percent: float) -> float:
        """Return a percentile of all compilations, in seconds."""
        return percentile([s for runs in self.compile_seconds.values() for s in runs], percent)

    def mask_percentiles(self, percent: float, cases: Iterable[str] | None = None) -> list[float]:
        """Return a percentile of a row's mask, of each run, over some cases or all of them."""
        return _of_runs(self.mask_seconds, percent, cases)

    def accept_percentiles(self, percent: float) -> list[float]:
        """Return a percentile of going on by a token, of each run."""
        return _of_runs(self.accept_seconds, percent, None)

    def document(self) -> dict[str, Any]:
        """Return everything, for a JSON file; percentiles of the many times."""
        if self.why_missing is not None:
            return {"missing": self.why_missing}
        masks = {
            case: {
                f"p{percent}": self.mask_percentiles(percent, [case]) for percent in (50, 90, 99)
            }
            for case in self.mask_seconds
        }
        return {
            "version": self.version,
            "ready_seconds": self.ready_seconds,
            "refused": self.refused,
            "compile_seconds": self.compile_seconds,
            "mask_seconds": masks,
            "accept_seconds": {f"p{n}": self.accept_percentiles(n) for n in (50, 99)},
            "texts": self.num_texts,
            "texts_refused": self.num_refused,
        }


def _of_runs(
    seconds: dict[str, list[list[float]]], percent: float, cases: Iterable[str] | None
) -> list[float]:
    names = seconds if cases is None else cases
    parts = zip(*(seconds[name] for name in names), strict=True)
    runs = [[value for part in run for value in part] for run in parts]
    return [percentile(run, percent) for run in runs if run]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def measure_masks(
    vocabulary: Vocabulary,
    tokenize: Callable[[str], list[int]],
    cases: Sequence[Case],
    schemas: Sequence[Case],
    *,
    batch: int,
    steps: int,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Library]:
    """Compile the cases and walk through their texts with each library in turn.

    Parameters
    ----------
    vocabulary : Vocabulary
    tokenize : callable
        How the texts are cut into tokens.
    cases : sequence of Case
    schemas : sequence of Case
        Compiled once, too, and not walked through.
    batch : int
        Rows of a step. Each has a case; a row whose text has ended begins another one. A library
        leaves out the rows whose case it refuses.
    steps : int
        Tokens of each row and run.
    repeats : int
        Runs of each library; each begins with compiling the cases anew.
    seed : int
        Of the texts; all libraries get the same ones.
    say : callable
        Told what goes on, line by line.
    """
    libraries = [Library(name) for name in BACKENDS]
    backends = [_load(library, vocabulary) for library in libraries]
    walked = cases[:batch]
    for repeat in range(repeats):
        for library, backend in zip(libraries, backends, strict=True):
            if backend is None:
                continue
            if repeat == 0:
                for schema in schemas:
                    _compile(library, backend, schema)
            compiled = {case.name: _compile(library, backend, case) for case in walked}
            rows = [
                _Row(case, made, tokenize, random.Random(f"{seed} {repeat} {i}"))
                for i, case in enumerate(walked[i % len(walked)] for i in range(batch))
                if (made := compiled[case.name]) is not None
            ]
            _walk(library, rows, steps, vocabulary.num_words)
            if rows:
                [median] = library.mask_percentiles(50)[-1:]
                say(f"  masks, {library.name}: {1e6 * median:.1f} us")
    return libraries


def _load(library: Library, vocabulary: Vocabulary) -> ConstraintBackend | None:
    from quire.structured.backends import load_constraint_backend

    started = time.perf_counter()
    try:
        backend = load_constraint_backend(library.name, vocabulary, DEADLINE_SECONDS)
    except InvalidRequestError:
        library.why_missing = "not installed"
        return None
    library.ready_seconds = time.perf_counter() - started
    library.version = metadata.version(library.name)
    return backend


def _compile(library: Library, backend: ConstraintBackend, case: Case) -> CompiledConstraint | None:
    if case.name in library.refused:
        return None
    started = time.perf_counter()
    try:
        compiled = backend.compile(case.params().spec)
    except InvalidRequestError as error:
        library.refused[case.name] = str(error)
        return None
    library.compile_seconds.setdefault(case.name, []).append(time.perf_counter() - started)
    return compiled


class _Row:
    """A row of the batch: texts of its case, one after the other."""

    def __init__(
        self,
        case: Case,
        compiled: CompiledConstraint,
        tokenize: Callable[[str], list[int]],
        rng: random.Random,
    ) -> None:
        self.case = case
        self._compiled = compiled
        self._tokenize = tokenize
        self._rng = rng
        self.num_texts = self.num_refused = 0
        self._begin()

    def _begin(self) -> None:
        self.constraint = self._compiled.start()
        self.tokens = self._tokenize(self.case.draw(self._rng))[::-1]
        self.num_texts += 1

    def begin_next(self, *, as_whole: bool) -> None:
        """Take up the next text; a library that takes a whole one for unfinished refuses it."""
        if not (as_whole and self.constraint.is_accepting()):
            self.num_refused += 1
        self._begin()


def _walk(library: Library, rows: list[_Row], steps: int, num_words: int) -> None:
    """Let all rows go on together, and take down how long the processor is at each of them."""
    import numpy as np

    masks: npt.NDArray[np.int32] = np.zeros((len(rows), num_words), dtype=np.int32)
    memory = np.ones(_MEMORY_BYTES // 8, dtype=np.int64)
    clock = time.thread_time  # nothing waits here, and others on the machine are left out
    filled: dict[str, list[float]] = {row.case.name: [] for row in rows}
    accepted: dict[str, list[float]] = {row.case.name: [] for row in rows}
    for _ in range(steps):
        memory.sum()
        for row, mask in zip(rows, masks, strict=True):
            started = clock()
            row.constraint.fill_mask(mask)
            filled[row.case.name].append(clock() - started)
        for row, mask in zip(rows, masks, strict=True):
            token = row.tokens.pop()
            if not mask[token // 32] >> token % 32 & 1:
                row.begin_next(as_whole=False)
                continue
            started = clock()
            row.constraint.accept([token])
            accepted[row.case.name].append(clock() - started)
            if not row.tokens:
                row.begin_next(as_whole=True)
    for case in filled:
        library.mask_seconds.setdefault(case, []).append(filled[case])
        library.accept_seconds.setdefault(case, []).append(accepted[case])
    for row in rows:
        library.num_texts += row.num_texts
        library.num_refused += row.num_refused
