"""Rows of token ids out of samples: short ones side by side, or long contexts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from quire.demo.samples import SPECIAL_TOKENS, Sample

ROW_LEN = 256
LONG_ROW_LEN = 1024
_WAITING = 64
_SHORTEST_COPIED = 4
_LONGEST_COPIED = 32
_MOST_COPIES = 6
_SMALLEST_POOL = 64


@dataclass(slots=True)
class EncodedSample:
    """A sample as token ids, with the weight of predicting each of them."""

    token_ids: list[int]
    weights: list[float]


@dataclass(slots=True)
class Row:
    """One row of a training batch, filled from the left.

    Attributes
    ----------
    token_ids, positions, sample_ids : list[int]
        Padding has sample id -1, and each padded place an id of its own below that would
        change nothing: a padded token attends to padding only.
    weights : list[float]
        The weight of predicting ``token_ids[i]`` from what precedes it in its sample.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, sample: EncodedSample, sample_id: int, start: int) -> None:
        """Append a sample whose first token stands at position ``start``."""
        count = len(sample.token_ids)
        # Nothing precedes a sample's first token, so it is not predicted.
        alone = not self.sample_ids or self.sample_ids[-1] != sample_id
        self.token_ids += sample.token_ids
        self.positions += range(start, start + count)
        self.sample_ids += [sample_id] * count
        self.weights += [0.0 if alone else sample.weights[0], *sample.weights[1:]]

    def pad(self, length: int) -> None:
        """Fill up to ``length`` with tokens that count nothing."""
        missing = length - len(self.token_ids)
        self.token_ids += [0] * missing
        self.positions += [0] * missing
        self.sample_ids += [-1] * missing
        self.weights += [0.0] * missing


@dataclass(frozen=True, slots=True)
class Batch:
    """The arrays of one training step, each ``[num_rows, row_len]``."""

    input_ids: np.ndarray
    positions: np.ndarray
    sample_ids: np.ndarray
    weights: np.ndarray


def to_batch(rows: list[Row], length: int) -> Batch:
    """Pad rows to one length and stack them."""
    for row in rows:
        row.pad(length)
    return Batch(
        np.array([row.token_ids for row in rows], dtype=np.int64),
        np.array([row.positions for row in rows], dtype=np.int64),
        np.array([row.sample_ids for row in rows], dtype=np.int64),
        np.array([row.weights for row in rows], dtype=np.float32),
    )


class Packer:
    """Packs a stream of samples into rows.

    Parameters
    ----------
    samples : Iterator[Sample]
        Endless.
    tokenizer : Tokenizer
    max_position : int
        Positions stay below it.
    seed : int
        Of the positions at which samples start.
    """

    def __init__(
        self, samples: Iterator[Sample], tokenizer: Tokenizer, *, max_position: int, seed: int
    ) -> None:
        self._samples = samples
        self._tokenizer = tokenizer
        self._max_position = max_position
        self._rng = random.Random(seed)
        self._vocab_size = tokenizer.get_vocab_size()
        self._waiting: list[EncodedSample] = []

    def _encode(self, sample: Sample) -> EncodedSample:
        token_ids: list[int] = []
        weights: list[float] = []
        for text, learned in sample.parts:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            token_ids += ids
            weights += [1.0 if learned else 0.0] * len(ids)
        return EncodedSample(token_ids, weights)

    def _refill(self) -> None:
        while len(self._waiting) < _WAITING:
            encoded = self._encode(next(self._samples))
            if len(encoded.token_ids) <= ROW_LEN:
                self._waiting.append(encoded)

    def _take(self, room: int) -> EncodedSample | None:
        """Take the sample that has waited longest among those that fit."""
        self._refill()
        for index, sample in enumerate(self._waiting):
            if len(sample.token_ids) <= room:
                return self._waiting.pop(index)
        return None

    def _start(self, count: int) -> int:
        """Draw where a sample of ``count`` tokens starts: half at 0, half anywhere."""
        if self._rng.random() < 0.5:
            return 0
        return self._rng.randint(0, self._max_position - count)

    def short_rows(self, count: int, *, num_copied: int = 0, pool: float = 1.0) -> Batch:
        """Rows of samples that do not see each other, and rows that teach nothing but copying.

        Parameters
        ----------
        count : int
            Rows of text.
        num_copied : int
            Further rows, of random tokens that are repeated: the quickest way to the attention
            heads that find what was said before.
        pool : float
            The share of the vocabulary that these tokens are drawn from. Copying is learned
            far sooner on a few tokens, and carries over when the pool grows.
        """
        rows = []
        for _ in range(count):
            row = Row()
            sample_id = 0
            while (sample := self._take(ROW_LEN - len(row.token_ids))) is not None:
                row.add(sample, sample_id, self._start(len(sample.token_ids)))
                sample_id += 1
            rows.append(row)
        rows += [self._copied_row(pool) for _ in range(num_copied)]
        return to_batch(rows, ROW_LEN)

    def _copied_row(self, pool: float) -> Row:
        row = Row()
        sample_id = 0
        first = len(SPECIAL_TOKENS)
        last = max(first + _SMALLEST_POOL, int(pool * self._vocab_size)) - 1
        while (room := ROW_LEN - len(row.token_ids)) >= 2 * _SHORTEST_COPIED:
            count = self._rng.randint(_SHORTEST_COPIED, min(_LONGEST_COPIED, room // 2))
            times = self._rng.randint(2, min(_MOST_COPIES, room // count))
            drawn = [self._rng.randint(first, last) for _ in range(count)]
            # Nothing tells that the first repeat begins; all after its first token is told.
            weights = [0.0] * (count + 1) + [1.0] * (count * (times - 1) - 1)
            sample = EncodedSample(drawn * times, weights)
            row.add(sample, sample_id, self._start(count * times))
            sample_id += 1
        return row

    def long_rows(self, count: int) -> Batch:
        """Rows in which every sample sees all before it: the model learns long distances."""
        rows = []
        for _ in range(count):
            row = Row()
            start = self._rng.randint(0, self._max_position - LONG_ROW_LEN)
            while (sample := self._take(LONG_ROW_LEN - len(row.token_ids))) is not None:
                row.add(sample, 0, start + len(row.token_ids))
            rows.append(row)
        return to_batch(rows, LONG_ROW_LEN)
