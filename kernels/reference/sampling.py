"""From logits to token ids and log-probabilities.

Every row is worked on by itself: what comes out for a row is the same, bit for bit, whatever
rows stand beside it. So sums run over blocks of a fixed width (`torch.sum` splits a lone row
among threads, and several rows not), and no random generator is shared.

Where logits are equal, the lower token id counts as the more likely one.

The few candidates that are left of a vocabulary are handled in numpy, on the host: its calls
cost a fraction of torch's, and its selection and sorting are vectorised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BLOCK = 128
"""Width of the blocks whose sums and maxima stand for their tokens."""

_CHUNK = 1 << 19
"""Logits worked on at once where a whole copy of them is needed: what fits a CPU's cache."""

_FIRST_CANDIDATES = 128
"""Most likely tokens to look at first where only top_p or min_p limits their number."""

_MOST_CANDIDATES = 1024
"""Most likely tokens beyond which sorting the vocabulary is the shorter way."""

LEAST_TEMPERATURE = 1e-30
"""Below it float32 can no longer tell a temperature from 0; unequal logits are worlds apart."""


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.argmax`."""
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        rows: npt.NDArray[np.float32] = logits.numpy()
        ids = rows.argmax(axis=1)  # vectorised, unlike torch's
        return torch.from_numpy(ids), torch.from_numpy(rows[np.arange(len(rows)), ids])
    highest, places = logits.max(dim=1)
    return places, highest.float()


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.log_softmax`."""
    logits = logits.float()
    return logits - _log_normalizer(logits)[:, None]


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """See `quire.kernels.interface.Backend.apply_penalties`."""
    chosen = logits[rows, token_ids]
    chosen = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
    chosen -= frequency * counts + presence * (counts > 0)
    logits[rows, token_ids] = chosen


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """See `quire.kernels.interface.Backend.apply_bitmask`."""
    vocab_size = logits.shape[1]
    bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    allowed = ((bitmask[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size].bool()
    masked = logits[rows]
    masked[:, allowed.shape[1] :] = -torch.inf
    masked[:, : allowed.shape[1]].masked_fill_(~allowed, -torch.inf)
    logits[rows] = masked


def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.top_logits`."""
    vocab_size = logits.shape[1]
    k = min(k, vocab_size)
    pool = _Pool(logits, min(k + 1, vocab_size))
    values = torch.from_numpy(pool.values[:, :k]).to(logits.device)
    return values, torch.from_numpy(pool.ids(k)).to(logits.device)


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quire.kernels.interface.Backend.gather_logprobs`."""
    logits = logits.float()
    chosen = logits.gather(1, token_ids[:, None])
    if k:
        values, ids = top_logits(logits, k)
    else:
        values, ids = logits[:, :0], token_ids[:, None][:, :0]
    ranks = torch.count_nonzero(logits > chosen, dim=1) + 1
    logprobs = torch.cat((chosen, values), dim=1) - _log_normalizer(logits)[:, None]
    return torch.cat((token_ids[:, None], ids), dim=1), logprobs, ranks


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """See `quire.kernels.interface.Backend.sample_tokens`."""
    vocab_size = logits.shape[1]
    if len(logits):
        usable = _host(logits.amax(dim=1).isfinite())
        if not usable.all():
            logits = logits.clone()
            logits[torch.from_numpy(np.flatnonzero(~usable)).to(logits.device)] = 0.0
    limits = _Limits(*(_host(each) for each in (temperature, top_k, top_p, min_p, uniform)))
    all_kept = (limits.top_k <= 0) | (limits.top_k > vocab_size)
    limits = limits._replace(
        temperature=np.maximum(limits.temperature, LEAST_TEMPERATURE),
        top_k=np.where(all_kept, vocab_size, limits.top_k),
    )
    limited = (limits.top_k < vocab_size) | (limits.top_p < 1.0) | (limits.min_p > 0.0)
    if not limited.any():
        ids = _draw_from_all(logits, limits)
    elif limited.all():
        ids = _draw_from_top(logits, limits)
    else:
        ids = np.empty(len(logits), dtype=np.int64)
        for rows, draw in ((~limited, _draw_from_all), (limited, _draw_from_top)):
            ids[rows] = draw(_take(logits, rows), limits.take(rows))
    return torch.from_numpy(ids).to(logits.device)


class _Limits(NamedTuple):
    """What each row is to be drawn by, `[num_rows]` each."""

    temperature: Floats
    top_k: Ints
    """The size of the vocabulary where all are kept."""
    top_p: Floats
    min_p: Floats
    uniform: Floats

    def take(self, rows: Ints | npt.NDArray[np.bool_] | slice) -> _Limits:
        return _Limits(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.uniform[rows],
        )


def _take(logits: torch.Tensor, mask: npt.NDArray[np.bool_]) -> torch.Tensor:
    return logits[torch.from_numpy(np.flatnonzero(mask)).to(logits.device)]


def _host(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.cpu().numpy()
    return array


def _row_chunks(logits: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


# ---- sums over the whole vocabulary


def _weights(
    logits: torch.Tensor, highest: torch.Tensor, temperature: Floats
) -> tuple[torch.Tensor, Floats]:
    """Return exp((logits - highest) / temperature), in blocks, and running sums over blocks.

    Shapes `[num_rows, num_blocks, _BLOCK]` in float32, 0 past the vocabulary, and
    `[num_rows, num_blocks]`.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _BLOCK)
    weights = logits.new_empty(num_rows, num_blocks * _BLOCK)
    inside = weights[:, :vocab_size]
    torch.sub(logits, highest[:, None], out=inside)
    finite = np.minimum(temperature, np.finfo(np.float32).max).astype(np.float32)
    inside /= torch.from_numpy(finite).to(logits.device)[:, None]
    weights[:, vocab_size:] = -torch.inf
    blocks = weights.exp_().view(num_rows, num_blocks, _BLOCK)
    return blocks, _host(blocks.sum(dim=2)).cumsum(axis=1, dtype=np.float64)


def _totals(logits: torch.Tensor, temperature: Floats) -> Floats:
    """Return the sum of each row's weights, `[num_rows]`."""
    highest = logits.amax(dim=1)
    totals = [
        _weights(logits[rows], highest[rows], temperature[rows])[1][:, -1]
        for rows in _row_chunks(logits)
    ]
    return np.concatenate(totals) if totals else np.empty(0)


def _log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    totals = torch.from_numpy(np.log(_totals(logits, np.ones(len(logits)))))
    return (logits.amax(dim=1).double() + totals.to(logits.device)).float()


def _pick(cumulative: Floats, target: Floats, reach: Floats) -> Ints:
    """Return where each row's running sum first exceeds its target, `[num_rows]`.

    A token of no weight leaves the sum where it was and so is never picked. Rounding may have
    brought a target up to ``reach``, the sum it was a part of; it is taken to lie below.
    """
    below = np.minimum(target, np.nextafter(reach, 0.0))
    place: Ints = (cumulative > below[:, None]).argmax(axis=1)
    return place


def _draw_from_all(logits: torch.Tensor, limits: _Limits) -> Ints:
    """Draw from the whole vocabulary: first a block of it, then a token of the block."""
    picked = []
    highest = logits.amax(dim=1)
    for rows in _row_chunks(logits):
        weights, sums = _weights(logits[rows], highest[rows], limits.temperature[rows])
        index = np.arange(len(sums))
        target = limits.uniform[rows] * sums[:, -1]
        block = _pick(sums, target, sums[:, -1])
        target -= np.where(block > 0, sums[index, block - 1], 0.0)
        chosen = weights[torch.from_numpy(index), torch.from_numpy(block)]
        inside = _host(chosen).cumsum(axis=1, dtype=np.float64)
        picked.append(block * _BLOCK + _pick(inside, target, inside[:, -1]))
    return np.concatenate(picked)


# ---- the highest logits


class _Pool:
    """The k highest logits of each row, and the part of the vocabulary that has them.

    In a large vocabulary the k blocks of highest maximum hold the k highest logits; of several
    that equal the last of them, they may lack some.

    Attributes
    ----------
    values : ndarray[num_rows, k], float32
        In descending order.
    """

    def __init__(self, logits: torch.Tensor, k: int) -> None:
        self._logits = logits
        self._k = k
        num_rows, vocab_size = logits.shape
        num_blocks = vocab_size // _BLOCK
        self._starts: torch.Tensor | None = None
        self._pool = logits
        if num_blocks >= 8 * k:
            width = num_blocks * _BLOCK
            blocks = logits[:, :width].view(num_rows, num_blocks, _BLOCK)
            starts = blocks.amax(dim=2).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
            rows = torch.arange(num_rows, device=logits.device)[:, None]
            self._starts = starts * _BLOCK
            self._pool = torch.cat((blocks[rows, starts].flatten(1), logits[:, width:]), dim=1)
            self._tail = width - k * _BLOCK
        self.values = _sorted_values(self._pool, k)

    def ids_at(self, place: Ints) -> Ints:
        """Return whose logit stands at a place in each row's values, `[num_rows]`.

        Equal logits stand in the order of their token ids.
        """
        index = np.arange(len(place))
        value = self.values[index, place]
        nth = place - (self.values > value[:, None]).sum(axis=1)
        ids = self._vocabulary_ids(self._first(value))
        unclear = nth > 0
        if self._starts is not None:
            unclear |= value == self.values[:, -1]
        for row in np.flatnonzero(unclear).tolist():
            ids[row] = self._level(row, value[row])[nth[row]]
        return ids

    def ids(self, n: int) -> Ints:
        """Return whose the first n values are, `[num_rows, n]`.

        n is less than k, or both are the size of the vocabulary.
        """
        size, device = self._pool.shape[1], self._pool.device
        if device.type == "cpu":
            places = self._pool.numpy().argpartition(size - self._k, axis=1)[:, size - self._k :]
        else:
            places = _host(self._pool.topk(self._k, dim=1, sorted=False).indices)
        ids = self._vocabulary_ids(places)
        ids.sort(axis=1)
        found = _host(self._logits.gather(1, torch.from_numpy(ids).to(device)))
        ids = np.take_along_axis(ids, np.argsort(-found, axis=1, kind="stable")[:, :n], axis=1)
        if n < self._k:
            # Of logits that equal the n-th, others than the first may have been selected.
            for row in np.flatnonzero(self.values[:, n - 1] == self.values[:, n]).tolist():
                value = self.values[row, n]
                above = int((self.values[row] > value).sum())
                ids[row, above:] = self._level(row, value)[: n - above]
        return ids

    def _first(self, value: npt.NDArray[np.float32]) -> Ints:
        """Return where in the pool each row's value first occurs, `[num_rows]`."""
        if self._pool.device.type == "cpu":
            place: Ints = (self._pool.numpy() == value[:, None]).argmax(axis=1)
            return place
        here = self._pool == torch.from_numpy(value).to(self._pool.device)[:, None]
        return np.asarray(_host(here.int().argmax(dim=1)))

    def _level(self, row: int, value: float) -> Ints:
        """Return all tokens of a row that have this logit, in order."""
        return np.asarray(_host((self._logits[row] == float(value)).nonzero()[:, 0]))

    def _vocabulary_ids(self, places: Ints) -> Ints:
        """Return token ids from places in the pool, `[num_rows]` or `[num_rows, n]`."""
        if self._starts is None:
            return places
        starts = _host(self._starts)
        flat = places.reshape(len(places), -1)
        block = np.minimum(flat // _BLOCK, self._k - 1)
        inside = np.take_along_axis(starts, block, axis=1) + flat % _BLOCK
        ids = np.where(flat < self._k * _BLOCK, inside, flat + self._tail)
        return ids.reshape(places.shape)


def _sorted_values(logits: torch.Tensor, k: int) -> npt.NDArray[np.float32]:
    """Return the k highest logits of each row in descending order."""
    if logits.device.type != "cpu":
        return _host(logits.topk(k, dim=1).values)
    values: npt.NDArray[np.float32] = logits.numpy()
    size = values.shape[1]
    if k < size // 4:
        values = np.partition(values, size - k, axis=1)[:, size - k :]
    return np.sort(values, axis=1)[:, ::-1][:, :k].copy()


def _draw_from_top(logits: torch.Tensor, limits: _Limits) -> Ints:
    """Draw where tokens are left out: from a few candidates where they do, else after a sort."""
    num_rows, vocab_size = logits.shape
    total = np.zeros(num_rows)
    whole = (limits.top_k == vocab_size) & (limits.min_p == 0.0)
    if whole.any():
        here = logits if whole.all() else _take(logits, whole)
        total[whole] = _totals(here, limits.temperature[whole])
    ids = np.empty(num_rows, dtype=np.int64)
    few = min(_FIRST_CANDIDATES, vocab_size)
    counts = np.where(limits.top_k < vocab_size, limits.top_k, few)
    for most, size in ((_MOST_CANDIDATES, 8 * _CHUNK), (vocab_size, _CHUNK)):
        rows = np.flatnonzero((counts > 0) & (counts <= most))
        step = max(1, size // vocab_size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            here = logits if len(part) == num_rows else logits[torch.from_numpy(part)]
            pool = _Pool(here, int(counts[part].max()))
            place, enough = _place(pool.values, limits.take(part), total[part])
            ids[part] = pool.ids_at(place)
            counts[part[enough]] = 0
        counts[counts > 0] = vocab_size
    return ids


def _place(
    values: npt.NDArray[np.float32], limits: _Limits, total: Floats
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Draw a place in the list of a row's highest logits.

    Parameters
    ----------
    values : ndarray[num_rows, k]
        In descending order.
    limits : _Limits
    total : ndarray[num_rows]
        The weight of the whole vocabulary, or 0 where top_k or min_p shortens the list first.

    Returns
    -------
    place : ndarray[num_rows]
    enough : ndarray[num_rows]
        False where tokens beyond the list may belong to it, so that the place means nothing.
    """
    num_candidates = values.shape[1]
    exact = values.astype(np.float64)
    weights = np.exp((exact - exact[:, :1]) / limits.temperature[:, None])
    keep = (weights >= limits.min_p[:, None]) & (weights > 0.0)
    keep &= np.arange(num_candidates) < limits.top_k[:, None]
    weights[~keep] = 0.0
    cumulative = weights.cumsum(axis=1)
    survivors = keep.sum(axis=1)
    mass = np.where(total > 0.0, total, cumulative[:, -1])
    most = np.where(limits.top_p < 1.0, limits.top_p * mass, np.inf)
    keep[:, 1:] &= cumulative[:, :-1] < most[:, None]
    kept = keep.sum(axis=1)
    listed = np.where(total > 0.0, kept, survivors)
    enough = (listed < num_candidates) | (limits.top_k <= num_candidates)
    reach = cumulative[np.arange(len(values)), kept - 1]
    return _pick(cumulative, limits.uniform * reach, reach), enough
